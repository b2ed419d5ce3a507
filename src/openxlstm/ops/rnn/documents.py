"""Documents laid end to end, each with a state of its own, run side by side without padding.

Documents are sorted by length, longest first. Between two consecutive lengths the set of documents that are
still running does not change, so that stretch is one dense call; the state of those that end there is kept
and the others run on. No padded position is ever computed and no document can see another.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from openxlstm.ops.rnn.cells import Cell
from openxlstm.state import map_state


def run_documents(
    run: Callable[..., tuple[Tensor, Any]],
    cell: Cell,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Any,
    cu_seqlens: Tensor,
    normalizer_floor: float | None,
) -> tuple[Tensor, Any]:
    """Run ``run`` over the documents of x (1, T, G, H, D) that ``cu_seqlens`` (N + 1,) delimits.

    State leaves (N, H, D). Returns h (1, T, H, D) and the states after each document (an empty document's is
    the one it came with).
    """
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    order = torch.tensor(sorted(range(len(lengths)), key=lambda n: -lengths[n]), device=x.device)
    starts = cu_seqlens[:-1].to(x.device).long()[order]
    cuts = sorted({0, *lengths})

    stretches = [(a, b, sum(length >= b for length in lengths)) for a, b in pairwise(cuts)]
    indices = [starts[:running, None] + torch.arange(a, b, device=x.device) for a, b, running in stretches]
    positions = torch.cat([index.flatten() for index in indices])  # every position once, stretch by stretch
    parts = x[0][positions].split([index.numel() for index in indices])

    state = map_state(lambda s: s[order], state)
    outputs, finished = [], []  # finished: rows in reverse order of their end
    for part, (a, b, running) in zip(parts, stretches, strict=True):
        finished.append(map_state(lambda s, k=running: s[k:], state))
        state = map_state(lambda s, k=running: s[:k], state)
        h, state = run(cell, part.unflatten(0, (running, b - a)), weight, bias, state, None, normalizer_floor)
        outputs.append(h.flatten(0, 1))
    finished.append(state)

    h = torch.cat(outputs)[torch.argsort(positions)]
    columns = zip(*reversed(finished), strict=True)
    back = torch.argsort(order)
    return h[None], cell.state_type(*(torch.cat(column)[back] for column in columns))
