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
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])  # longest first
    starts = torch.tensor([offsets[n] for n in order], device=x.device)
    state = map_state(lambda s: s[torch.tensor(order, device=x.device)], state)
    x = x[0]

    outputs, positions, finished = [], [], []  # finished: shortest documents first, blocks of rows
    running, begin = len(order), 0
    for end in sorted(set(lengths)):
        if end > begin:
            index = starts[:running, None] + torch.arange(
                begin, end, device=x.device
            )  # (running, end - begin)
            h, state = run(cell, x[index], weight, bias, state, None, normalizer_floor)
            outputs.append(h.flatten(0, 1))
            positions.append(index.flatten())
        remaining = sum(length > end for length in lengths)
        finished.append(map_state(lambda s, k=remaining: s[k:], state))
        state = map_state(lambda s, k=remaining: s[:k], state)
        running, begin = remaining, end

    back = torch.argsort(torch.cat(positions))
    h = torch.cat(outputs)[back]
    original = torch.argsort(torch.tensor(order, device=x.device))
    columns = zip(*reversed(finished), strict=True)
    return h[None], cell.state_type(*(torch.cat(column)[original] for column in columns))
