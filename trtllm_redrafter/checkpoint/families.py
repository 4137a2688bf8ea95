"""The model families: everything in which they differ, in Hugging Face's config.json and in the checkpoint.

A LLaMA-like model (the tensors of `checkpoint.names`) is supported by adding its row to `FAMILIES`; all code that
depends on the family asks the row.

    FAMILIES["Qwen3ForCausalLM"].qk_norm           # True
    FAMILIES["MistralForCausalLM"].redrafter       # "ReDrafterForLLaMALM"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

REDRAFTER_ARCHITECTURES: Mapping[str, str] = {
    "ReDrafterForLLaMALM": "LlamaForCausalLM",
    "ReDrafterForQWenLM": "Qwen2ForCausalLM",
}
"""ReDrafter architectures, with the base architecture if `base_model_architecture` is missing."""


@dataclass(frozen=True)
class Family:
    """One family. `attn_bias` and `mlp_bias` are the name of a key in Hugging Face's config.json, or fixed."""

    name: str
    architecture: str
    """In `architectures` of Hugging Face's config.json, and in the checkpoint."""
    model_type: str
    model_class: str
    """`llama` or `qwen`: which of TensorRT-LLM's two model classes loads it."""
    attn_bias: str | bool
    mlp_bias: str | bool
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before RoPE."""
    default_head_dim: int | None = None
    """Hugging Face's default if `head_dim` is missing; None: hidden_size / heads."""
    default_sliding_window: int | None = None
    """Hugging Face's default if `sliding_window` is missing."""
    has_window_switch: bool = False
    """Do `use_sliding_window` (false if missing) and `max_window_layers` decide whether the window is used?"""

    @property
    def redrafter(self) -> str:
        """TensorRT-LLM's architecture for this base with a drafter."""
        return "ReDrafterForQWenLM" if self.model_class == "qwen" else "ReDrafterForLLaMALM"

    @property
    def qwen_type(self) -> str | None:
        """How TensorRT-LLM's Qwen class tells its generations apart."""
        return self.model_type if self.model_class == "qwen" else None


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LLaMA", "LlamaForCausalLM", "llama", "llama", attn_bias="attention_bias", mlp_bias="mlp_bias"),
        Family(
            "Mistral", "MistralForCausalLM", "mistral", "llama",
            attn_bias=False, mlp_bias=False, default_sliding_window=4096,
        ),
        Family(
            "Qwen2", "Qwen2ForCausalLM", "qwen2", "qwen",
            attn_bias=True, mlp_bias=False, default_sliding_window=4096, has_window_switch=True,
        ),
        Family(
            "Qwen3", "Qwen3ForCausalLM", "qwen3", "qwen", attn_bias="attention_bias", mlp_bias=False,
            qk_norm=True, default_head_dim=128, default_sliding_window=4096, has_window_switch=True,
        ),
    )
}  # fmt: skip
"""By architecture."""


def family_of_type(model_type: object) -> Family | None:
    """By `model_type`, which transformers itself uses."""
    return next((family for family in FAMILIES.values() if family.model_type == model_type), None)
