"""xLSTM where an nn.LSTM stands: batches of different lengths in a PackedSequence, both directions."""

import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from openxlstm.models import xLSTM

lstm = xLSTM(input_size=10, hidden_size=32, num_layers=2, bidirectional=True, batch_first=True)
sequences = [torch.randn(length, 10) for length in (7, 31, 12)]
output, state = lstm(pack_sequence(sequences, enforce_sorted=False))
print([tuple(part.shape) for part in unpack_sequence(output)])
