"""Tables of the model families, and Hugging Face directories read with them.

Imports are lazy: a plan needs the tables and configs, but not `HFModel`, which imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_redrafter.base_models.families import FAMILIES, tensor_sources
    from trtllm_redrafter.base_models.hf_model import HFModel

__all__ = ["FAMILIES", "HFModel", "tensor_sources"]


def __getattr__(name: str) -> Any:
    if name == "HFModel":
        from trtllm_redrafter.base_models.hf_model import HFModel

        return HFModel
    if name in __all__:
        from trtllm_redrafter.base_models import families

        return getattr(families, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
