"""Recurrent networks with memory mixing: sLSTM, LSTM, GRU and Elman cells behind one operator."""

from openxlstm.ops.rnn.api import rnn, rnn_initial_state, rnn_step

__all__ = ["rnn", "rnn_initial_state", "rnn_step"]
