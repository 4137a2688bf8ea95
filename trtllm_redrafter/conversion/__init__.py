"""Hugging Face base model (or TensorRT-LLM checkpoint) and drafter → TensorRT-LLM checkpoint.

    plan = plan_conversion(ConvertOptions(base=..., drafter=..., ...))          # plan.py, options.py
    convert(plan, progress)                                                     # writer.py

The package does not have its function's name: `trtllm_redrafter.convert` is the API's, and importing a package of that
name would replace the function. Nothing is imported here: planning for a GPU host needs the options alone, not torch.
"""
