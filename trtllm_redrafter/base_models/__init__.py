"""Tables of the model families, and Hugging Face directories read with them.

Imports are lazy: a plan needs the tables and configs, but not `HFModel`, which imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_redrafter.base_models.hf_model import HFModel, tensor_sources
    from trtllm_redrafter.checkpoint.families import FAMILIES

__all__ = ["FAMILIES", "HFModel", "tensor_sources"]


def __getattr__(name: str) -> Any:
    if name in ("HFModel", "tensor_sources"):
        from trtllm_redrafter.base_models import hf_model

        return getattr(hf_model, name)
    if name == "FAMILIES":
        from trtllm_redrafter.checkpoint.families import FAMILIES

        return FAMILIES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
