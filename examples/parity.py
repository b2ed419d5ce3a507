"""What the sLSTM is for: parity of a bit string, on lengths never trained on. Takes about ten seconds."""

import torch

from openxlstm.models import xLSTM

torch.manual_seed(0)
net = xLSTM(input_size=2, hidden_size=32, num_layers=1, cell="slstm", num_heads=1, batch_first=True)
head = torch.nn.Linear(32, 2)
optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=1e-2)


def batch(size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    bits = torch.randint(2, (size, length))
    return torch.nn.functional.one_hot(bits, 2).float(), bits.cumsum(1) % 2


for _ in range(200):
    x, parity = batch(32, int(torch.randint(3, 25, ())))
    loss = torch.nn.functional.cross_entropy(head(net(x)[0]).flatten(0, 1), parity.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
x, parity = batch(64, 100)
print(f"accuracy at length 100: {(head(net(x)[0]).argmax(-1) == parity).float().mean():.3f}")
