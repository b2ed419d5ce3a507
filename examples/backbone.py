"""A mixed block stack as the backbone of a sequence classifier, and its state one position at a time."""

import torch

from openxlstm.models import xLSTMBlockStack, xLSTMBlockStackConfig

stack = xLSTMBlockStack(xLSTMBlockStackConfig(num_blocks=4, embedding_dim=64, slstm_at="[3:1]"))
head = torch.nn.Linear(64, 10)
x = torch.randn(8, 100, 64)
print("classes:", head(stack(x)[:, -1]).shape)

y, state = stack(x[:, :99], return_state=True)  # a prefix in parallel ...
last, state = stack.step(x[:, 99:], state)  # ... and one more position
print("same result:", torch.allclose(last, stack(x)[:, 99:], atol=1e-4))
