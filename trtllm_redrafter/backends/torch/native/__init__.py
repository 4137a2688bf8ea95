"""CPU kernels for bfloat16 decoding: one C++ file, compiled once per machine, loaded with ctypes."""
