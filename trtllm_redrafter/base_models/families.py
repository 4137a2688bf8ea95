"""Tables that map Hugging Face's tensor names and config fields to the checkpoint's, for all model families.

The code that reads these tables is the same for every family; a new family is a new row. The right-hand side lists the
Hugging Face tensors that are concatenated by rows, which for qkv is also the order of the joined tensor:

    ("attention.qkv.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"))
    ("mlp.fc.weight", ("mlp.gate_proj.weight",))      # the one whose output goes through SiLU
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_redrafter.checkpoint.config import ARCHITECTURES, CheckpointConfig
from trtllm_redrafter.checkpoint.layout import EMBEDDING, LM_HEAD, LN_F

LINEARS: Mapping[str, tuple[str, ...]] = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
"""Linear layers of a block, without `.weight` / `.bias`."""

NORMS: Mapping[str, str] = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_layernorm.weight": "post_attention_layernorm.weight",
}
QK_NORMS: Mapping[str, str] = {
    "attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
HF_EMBEDDING = "model.embed_tokens.weight"
HF_LM_HEAD = "lm_head.weight"
HF_NORM = "model.norm.weight"

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Buffers in old exports; they can be computed from the config."""


@dataclass(frozen=True)
class Family:
    """Differences between families. `attn_bias` and `mlp_bias` are the name of a config key, or fixed."""

    name: str
    model_type: str
    architecture: str
    attn_bias: str | bool
    mlp_bias: str | bool
    default_head_dim: int | None
    """Hugging Face's default if `head_dim` is missing; None: hidden_size / heads."""
    default_sliding_window: int | None
    """Hugging Face's default if `sliding_window` is missing."""
    has_window_switch: bool
    """Do `use_sliding_window` (false if missing) and `max_window_layers` decide whether the window is used?"""


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family("LLaMA", "llama", "LlamaForCausalLM", "attention_bias", "mlp_bias", None, None, False),
        Family("Mistral", "mistral", "MistralForCausalLM", False, False, None, 4096, False),
        Family("Qwen2", "qwen2", "Qwen2ForCausalLM", True, False, None, 4096, True),
        Family("Qwen3", "qwen3", "Qwen3ForCausalLM", "attention_bias", False, 128, 4096, True),
    )
}
"""By the architecture name in Hugging Face's config.json."""

MODEL_TYPES: Mapping[str, Family] = {family.model_type: family for family in FAMILIES.values()}
"""By `model_type`, which transformers itself uses."""

assert set(FAMILIES) == set(ARCHITECTURES)


def tensor_sources(config: CheckpointConfig) -> dict[str, tuple[str, ...]]:
    """Checkpoint name → the Hugging Face tensors it is made from, for the base model of `config`."""
    sources: dict[str, tuple[str, ...]] = {
        EMBEDDING: (HF_EMBEDDING,),
        LN_F: (HF_NORM,),
        LM_HEAD: (HF_EMBEDDING if config.tie_word_embeddings else HF_LM_HEAD,),
    }
    biased = {
        "attention.qkv": config.attn_bias,
        "attention.dense": config.dense_bias,
        "mlp.fc": config.mlp_bias,
        "mlp.gate": config.mlp_bias,
        "mlp.proj": config.mlp_bias,
    }
    for i in range(config.num_hidden_layers):
        ours, theirs = f"transformer.layers.{i}.", f"model.layers.{i}."
        for name, parts in LINEARS.items():
            sources[f"{ours}{name}.weight"] = tuple(f"{theirs}{part}.weight" for part in parts)
            if biased[name]:
                sources[f"{ours}{name}.bias"] = tuple(f"{theirs}{part}.bias" for part in parts)
        norms = {**NORMS, **QK_NORMS} if config.has_qk_norm else NORMS
        sources |= {ours + ours_norm: (theirs + theirs_norm,) for ours_norm, theirs_norm in norms.items()}
    return sources
