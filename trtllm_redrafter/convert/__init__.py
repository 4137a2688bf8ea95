"""Hugging Face base model (or TensorRT-LLM checkpoint) and drafter → TensorRT-LLM checkpoint."""

from trtllm_redrafter.convert.execute import convert
from trtllm_redrafter.convert.options import ConvertOptions
from trtllm_redrafter.convert.plan import ConversionPlan, plan_conversion

__all__ = ["ConversionPlan", "ConvertOptions", "convert", "plan_conversion"]
