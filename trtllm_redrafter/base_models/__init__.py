"""Hugging Face base models: tables of names and fields per family, and the reader that walks them."""

from trtllm_redrafter.base_models.families import FAMILIES, tensor_sources
from trtllm_redrafter.base_models.hf_model import HFModel

__all__ = ["FAMILIES", "HFModel", "tensor_sources"]
