"""Products of large float32 matrices."""

from openxlstm.ops.matmul.api import matmul

__all__ = ["matmul"]
