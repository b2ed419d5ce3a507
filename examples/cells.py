"""Classical cells on the rnn operator: heads, any gradient order, documents, states."""

import torch

from openxlstm.ops import rnn, rnn_step

batch, time, heads, dim = 2, 50, 4, 16
for cell, gates in (("slstm", 4), ("lstm", 4), ("gru", 3), ("elman", 1)):
    x = torch.randn(batch, time, gates, heads, dim, requires_grad=True)  # input part of the gates
    weight = torch.randn(gates, heads, dim, dim) / dim**0.5  # block-diagonal recurrence
    h, state = rnn(cell, x, weight, return_state=True)
    h.square().mean().backward()
    h_next, state = rnn_step(cell, x[:, 0].detach(), weight, None, state)  # one more step
    print(f"{cell}: {tuple(h.shape)}, gradient {float(x.grad.norm()):.4f}, next {tuple(h_next.shape)}")
