"""Fixtures of the operators' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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

    Tensors that share memory share the copy too; results go back to where they belong.
    """

    def __getitem__(kernel: support.Kernel, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            tensors = [x for x in arguments if isinstance(x, Tensor)]
            copies = {_memory(x).data_ptr(): _surrounded(_memory(x)) for x in tensors}

            def inside(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                block = copies[_memory(x).data_ptr()][MARGIN:-MARGIN].view(x.dtype)
                return block.as_strided(x.shape, x.stride(), block.storage_offset() + x.storage_offset())

            get(kernel, grid)(*map(inside, arguments), **options)
            for x in tensors:
                block = copies[_memory(x).data_ptr()]
                for margin in (block[:MARGIN], block[-MARGIN:]):
                    assert (margin == POISON).all(), f"{kernel.function} writes out of bounds"
                _memory(x).copy_(block[MARGIN:-MARGIN])

        return launch

    return __getitem__


def _memory(x: Tensor) -> Tensor:
    """All bytes of the memory that x lies in."""
    storage = x.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)


def _surrounded(memory: Tensor) -> Tensor:
    """A copy with margins, the end at a multiple of eight bytes as torch wants it."""
    block = memory.new_full((memory.numel() + 2 * MARGIN,), POISON)
    block[MARGIN:-MARGIN] = memory
    return block
