"""Several documents in one row: nothing crosses a boundary, neither values nor gradients."""

import torch

from openxlstm.ops import explain, mlstm

lengths = [20, 1, 43]
q, k, v = (torch.randn(1, sum(lengths), 4, 32, requires_grad=True) for _ in range(3))
i, f = torch.randn(1, sum(lengths), 4), torch.randn(1, sum(lengths), 4) + 3
cu_seqlens = torch.tensor([0, 20, 21, 64], dtype=torch.int32)

h = mlstm(q, k, v, i, f, cu_seqlens=cu_seqlens)
h[:, 21:].sum().backward()  # a loss on the last document only
print("gradient in the documents before it:", float(k.grad[:, :21].abs().sum()))
print(explain("mlstm"))
