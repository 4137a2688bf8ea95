"""The names of the format: files of checkpoints and engines, and tensors beside Hugging Face's.

checkpoint/  config.json  manifest.json  rank{N}.safetensors  [draft_vocab.safetensors  quant_cfg.json]  tokenizer/
engine/      config.json  manifest.json  tokenizer/  and checkpoint/ (torch) or rank{N}.engine (TensorRT-LLM)

hf_names("transformer.layers.0.attention.dense.weight")     # ("model.layers.0.self_attn.o_proj.weight",)
hf_names("transformer.layers.0.mlp.fc.weight")              # ("….mlp.gate_proj.weight",): its output goes through SiLU
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

MANIFEST = "manifest.json"
TOKENIZER_DIRECTORY = "tokenizer"
"""Of checkpoints and engines."""

DRAFT_VOCAB_FILE = "draft_vocab.safetensors"
QUANT_CFG = "quant_cfg.json"
"""What NVIDIA's quantizer writes beside config.json."""

DRAFTER_WEIGHTS = "model.safetensors"
"""The file whose hash identifies a drafter."""

ENGINE_CHECKPOINT = "checkpoint"
"""Where an engine of the torch backend keeps the checkpoint that it executes."""

EOS_TOKEN_IDS = "eos_token_ids"
"""The key under which manifests of checkpoints and configs of engines keep the tokens that end a text."""

TRAINED_DRAFT_LEN = "trained_draft_len"
"""The key under which manifests of checkpoints keep how many tokens ahead the drafter was trained."""

EMBEDDING = "transformer.vocab_embedding.weight"
LM_HEAD = "lm_head.weight"
LN_F = "transformer.ln_f.weight"
DRAFTER = "drafter."
"""What the names of a drafter's tensors begin with; after it, they are TensorRT-LLM's (`lm_head.weight`, ...)."""

HF_MODULES: Mapping[str, tuple[str, ...]] = {
    "transformer.vocab_embedding": ("model.embed_tokens",),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
}
HF_LAYER_MODULES: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_layernorm": ("self_attn.q_norm",),
    "attention.k_layernorm": ("self_attn.k_norm",),
    "attention.dense": ("self_attn.o_proj",),
    "post_layernorm": ("post_attention_layernorm",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
"""A layer's modules and Hugging Face's, which are concatenated by rows: for qkv, the order of the joined tensor."""

HF_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Buffers in old exports of Hugging Face models; they can be computed from the config."""

_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")


def rank_file_name(rank: int) -> str:
    return f"rank{rank}.safetensors"


def rank_file(directory: Path, rank: int) -> Path:
    return directory / rank_file_name(rank)


def layer_prefix(layer: int) -> str:
    return f"transformer.layers.{layer}."


def hf_names(name: str) -> tuple[str, ...]:
    """The Hugging Face tensors that a weight or bias of the base model is made of."""
    module, _, kind = name.rpartition(".")
    if match := _LAYER.fullmatch(module):
        return tuple(f"model.layers.{match[1]}.{part}.{kind}" for part in HF_LAYER_MODULES[match[2]])
    return tuple(f"{part}.{kind}" for part in HF_MODULES[module])
