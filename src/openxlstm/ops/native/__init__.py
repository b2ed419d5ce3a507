"""Native CPU kernels: plain C++17 behind ctypes, found or compiled by :mod:`openxlstm.ops.native.loader`."""
