"""Stand-ins for a GPU host, generated from the documented interface of TensorRT-LLM in tests/data/trtllm.

They accept exactly what is documented, behave as documented, and fail in the documented ways. They show that our side
of the interface is right; what the real thing does is shown by tests/gpu on a GPU host, and by nothing else.
"""
