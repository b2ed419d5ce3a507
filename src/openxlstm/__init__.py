"""openxlstm: the xLSTM family in one library, exact and fast."""

__version__ = "0.1.0"
