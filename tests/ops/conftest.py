"""Fixtures of the operators' tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from openxlstm.ops.gpu import support

MARGIN = 4096
"""Bytes before and after what a kernel may touch."""
POISON = 0xFF
"""A byte of the margins: NaN in every floating type, -1 in every integer."""


@pytest.fixture
def poisoned(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where Triton kernels run, in such a way that mistakes show: what they are to fill starts as NaN, and
    what lies around their tensors is NaN before and must be so after."""
    monkeypatch.setattr(support.Kernel, "__getitem__", _guarded(support.Kernel.__getitem__))
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        yield triton_device
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def device(poisoned: torch.device) -> Iterator[torch.device]:
    """The same, and new tensors are made there."""
    with poisoned:
        yield poisoned


def _guarded(get: Callable[..., Any]) -> Callable[..., Any]:
    """``Kernel.__getitem__`` whose launches run on copies of their tensors with poisoned margins.

    Tensors that overlap share a copy; results go back to where they belong. Of many launches that differ by
    contents alone the first few are guarded.
    """
    seen: Counter[str] = Counter()

    def __getitem__(kernel: support.Kernel, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            kind = [(x.shape, x.stride()) if isinstance(x, Tensor) else x for x in arguments]
            seen[key := f"{kernel.function} {grid} {kind} {options}"] += 1
            if seen[key] > 3:
                get(kernel, grid)(*arguments, **options)
                return
            blocks = _blocks([x for x in arguments if isinstance(x, Tensor) and x.numel()])

            def inside(x: Any) -> Any:
                for block in blocks:
                    if isinstance(x, Tensor) and x.numel() and x.data_ptr() in block.span:
                        at = x.data_ptr() - block.span.start
                        copy = block.copy[MARGIN + at : -MARGIN].view(x.dtype)
                        return copy.as_strided(x.shape, x.stride(), copy.storage_offset())
                return x

            get(kernel, grid)(*map(inside, arguments), **options)
            for block in blocks:
                for margin in (block.copy[:MARGIN], block.copy[-MARGIN:]):
                    assert (margin == POISON).all(), f"{kernel.function} writes out of bounds"
                block.memory.copy_(block.copy[MARGIN:-MARGIN])

        return launch

    return __getitem__


class _Block(NamedTuple):
    """Bytes that overlapping tensors span."""

    span: range
    """Addresses."""
    memory: Tensor
    copy: Tensor
    """With margins."""


def _blocks(tensors: list[Tensor]) -> list[_Block]:
    spans: list[range] = []
    owners: list[Tensor] = []
    for x in sorted(tensors, key=Tensor.data_ptr):
        last = sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))
        end = -(-(x.data_ptr() + (last + 1) * x.itemsize) // 8) * 8  # whole numbers of every type
        end = min(end, x.untyped_storage().data_ptr() + x.untyped_storage().nbytes())
        if spans and x.data_ptr() < spans[-1].stop:
            spans[-1] = range(spans[-1].start, max(end, spans[-1].stop))
        else:
            spans.append(range(x.data_ptr(), end))
            owners.append(x)
    blocks = []
    for span, x in zip(spans, owners, strict=True):
        bytes_ = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
        start = span.start - x.untyped_storage().data_ptr()
        memory = bytes_[start : start + len(span)]
        copy = memory.new_full((len(span) + 2 * MARGIN,), POISON)
        copy[MARGIN:-MARGIN] = memory
        blocks.append(_Block(span, memory, copy))
    return blocks
