"""Which blocks of a stack are sLSTM: the xLSTM[a:b] notation and the ``slstm_at`` field."""

from __future__ import annotations

import re
from collections.abc import Sequence

_RATIO = re.compile(r"\s*\[?\s*(\d+)\s*:\s*(\d+)\s*\]?\s*")


def slstm_positions(ratio: str, num_blocks: int) -> list[int]:
    """Positions of the sLSTM blocks of an xLSTM[a:b], which has ``a`` mLSTM to ``b`` sLSTM blocks.

    The sLSTM blocks are spread evenly: ``slstm_positions("[1:1]", 4) == [1, 3]``,
    ``slstm_positions("7:1", 16) == [4, 12]``, ``"[1:0]"`` has none, ``"[0:1]"`` all. Where the ratio does not
    divide the number of blocks, the nearest number of sLSTM blocks is taken, and at least one if b > 0.

    Raises:
        ValueError: not of the form ``"[a:b]"`` or ``"a:b"``, or 0:0.
    """
    match = _RATIO.fullmatch(ratio)
    if match is None or match.group(1, 2) == ("0", "0"):
        raise ValueError(
            f"slstm_at {ratio!r} is not a ratio; write it like '[7:1]', mLSTM blocks to sLSTM blocks"
        )
    a, b = int(match[1]), int(match[2])
    count = max(round(num_blocks * b / (a + b)), int(b > 0))
    return [int((k + 0.5) * num_blocks / count) for k in range(count)]


def resolve_slstm_at(slstm_at: Sequence[int] | str, num_blocks: int) -> list[int]:
    """Sorted positions that ``slstm_at`` stands for: indices from 0, ``"all"`` or a ratio ``"[a:b]"``.

    Raises:
        ValueError: a position outside the stack, one given twice, or a string of another form.
    """
    if isinstance(slstm_at, str):
        return list(range(num_blocks)) if slstm_at == "all" else slstm_positions(slstm_at, num_blocks)
    positions = sorted(slstm_at)
    for position in positions:
        if not 0 <= position < num_blocks:
            # YAML reads an unquoted 7:1 as 7 minutes and 1 second.
            hint = "; in YAML a ratio needs quotes, '[7:1]'" if position >= 60 else ""
            last = num_blocks - 1
            raise ValueError(
                f"slstm_at holds {position}, but {num_blocks} blocks have positions 0 to {last}{hint}"
            )
    if len(set(positions)) != len(positions):
        raise ValueError(f"slstm_at {list(slstm_at)} names a block twice; name each sLSTM position once")
    return positions
