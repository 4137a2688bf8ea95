"""Hugging Face base model (or TensorRT-LLM checkpoint) and drafter → TensorRT-LLM checkpoint.

The package does not have its function's name: `trtllm_redrafter.convert` is the API's, and importing a package of that
name would replace the function.
"""

from trtllm_redrafter.conversion.execute import convert
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.planned import ConversionPlan

__all__ = ["ConversionPlan", "ConvertOptions", "convert", "plan_conversion"]
