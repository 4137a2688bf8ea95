"""The production backend: TensorRT-LLM engines on NVIDIA GPUs.

Planning (`versions`, `flag_table`, `flag_plan`, `rules`, `build_plan`) is pure and works anywhere; `tensorrt_llm`
itself is imported only in the process that executes an engine. What is assumed of TensorRT-LLM is written in tables
here, so that a test can compare every flag and call with its documented interface.
"""
