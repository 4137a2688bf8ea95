"""The TensorRT-LLM checkpoint format: config, tensor layout per rank, reader, manifest, checks.

Nothing is imported here: a plan for a GPU host reads configs only, and should not wait for torch, which `reader` needs.
"""
