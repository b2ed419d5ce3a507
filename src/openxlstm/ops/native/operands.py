"""The tensors a native call points to: in the form its kernels read, and alive until it is over."""

from __future__ import annotations

import torch
from torch import Tensor


class Operands:
    """Gives addresses of tensors and holds what it made of them; keep it until the call has returned."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []

    def hold(self, x: Tensor) -> Tensor:
        """x itself, which now lives as long as this."""
        self._alive.append(x)
        return x

    def keep(self, x: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """Address of a contiguous form of x, in ``dtype`` if given; None for None."""
        return None if x is None else self.hold(x.to(dtype or x.dtype).contiguous()).data_ptr()

    def strided(self, x: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
        """Address of x in ``dtype`` and its strides but the last; copied only if that is not 1."""
        x = x.to(dtype)
        x = self.hold(x if x.stride(-1) == 1 else x.contiguous())
        return x.data_ptr(), *x.stride()[:-1]
