"""Tiny Hugging Face models and drafters, written directly as config.json and safetensors.

Random but seeded weights of the four families, small enough that a conversion takes milliseconds. transformers is
not needed to make them, and opens them when a test wants it as a reference.

    base = write_base(tmp_path / "base", "qwen3", vocab_size=96)
    drafter = write_drafter(tmp_path / "drafter", vocab_size=96, layout="apple")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DRAFTER_LAYOUTS = ("apple", "lm_heads", "sequential", "input_projs", "ours")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0}

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def base_config(family: str, **changes: Any) -> dict[str, Any]:
    """A transformers-4 config.json; `changes` replace or (None) remove keys."""
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 96,
    }
    if family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    if family == "mistral":
        config |= {"sliding_window": None, "head_dim": 8}
    if family == "qwen3":
        config |= {"head_dim": 16, "attention_bias": False}
    config |= changes
    return {key: value for key, value in config.items() if value is not None or key == "sliding_window"}


def base_tensors(config: dict[str, Any], seed: int = 0, scale: float = 0.2) -> dict[str, Tensor]:
    """Random weights by Hugging Face name, in the config's dtype."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.get("torch_dtype") or config["dtype"])

    def rand(*shape: int, around: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale + around).to(dtype)

    h, inter, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    d = config.get("head_dim") or h // heads
    q, kv = heads * d, config["num_key_value_heads"] * d
    family = config["model_type"]
    tensors = {"model.embed_tokens.weight": rand(config["vocab_size"], h), "model.norm.weight": rand(h, around=1.0)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = rand(config["vocab_size"], h)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, out, inner in (
            ("self_attn.q_proj", q, h),
            ("self_attn.k_proj", kv, h),
            ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, q),
            ("mlp.gate_proj", inter, h),
            ("mlp.up_proj", inter, h),
            ("mlp.down_proj", h, inter),
        ):
            tensors[f"{p}{name}.weight"] = rand(out, inner)
            attention_bias = config.get("attention_bias", False) and "attn" in name
            qwen_bias = family == "qwen2" and "attn" in name and "o_proj" not in name
            if attention_bias or qwen_bias or (config.get("mlp_bias", False) and "mlp" in name):
                tensors[f"{p}{name}.bias"] = rand(out)
        tensors[p + "input_layernorm.weight"] = rand(h, around=1.0)
        tensors[p + "post_attention_layernorm.weight"] = rand(h, around=1.0)
        if family == "qwen3":
            tensors[p + "self_attn.q_norm.weight"] = rand(d, around=1.0)
            tensors[p + "self_attn.k_norm.weight"] = rand(d, around=1.0)
    return tensors


def write_base(path: Path, family: str = "llama", *, seed: int = 0, shards: int = 1, **changes: Any) -> Path:
    """Write a model directory: one model.safetensors, or `shards` files with an index."""
    path.mkdir(parents=True)
    config = base_config(family, **changes)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    tensors = base_tensors(config, seed)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = sorted(tensors)
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names[s::shards]}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[s::shards], file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def drafter_tensors(
    *,
    hidden_size: int = 32,
    exit_dim: int = 64,
    num_layers: int = 2,
    vocab_size: int = 96,
    rnn: bool = True,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.2,
) -> dict[str, Tensor]:
    """Random drafter weights by TensorRT-LLM name (without `drafter.`)."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    h, e = hidden_size, exit_dim
    tensors: dict[str, Tensor] = {}
    if e != 2 * h:
        tensors |= {"input_proj.weight": rand(e, 2 * h), "input_proj.bias": rand(e)}
    for i in range(num_layers):
        tensors |= {f"layers.{i}.linear.weight": rand(e, e), f"layers.{i}.linear.bias": rand(e)}
    tensors["lm_head.weight"] = rand(vocab_size, e)
    if rnn:
        tensors |= {"rnn_u.weight": rand(h, h), "rnn_u.bias": rand(h), "rnn_w.weight": rand(h, h)}
    return tensors


def renamed(tensors: dict[str, Tensor], layout: str, num_layers: int) -> dict[str, Tensor]:
    """The same tensors under the names of one of the published layouts."""
    stem = {"lm_heads": "lm_heads", "sequential": "0", "input_projs": "lm_heads"}.get(layout, "lm_head")
    if layout == "ours":
        return dict(tensors)

    def name(old: str) -> str:
        if old.startswith("layers."):
            return stem + old.removeprefix("layers")
        if old == "lm_head.weight":
            return f"{stem}.{num_layers}.weight"
        return old.replace("input_proj.", "input_projs.") if layout == "input_projs" else old

    return {name(old): tensor for old, tensor in tensors.items()}


def write_drafter(
    path: Path,
    *,
    layout: str = "apple",
    hidden_size: int = 32,
    exit_dim: int = 64,
    num_layers: int = 2,
    vocab_size: int = 96,
    rnn: bool = True,
    draft_len: int | None = 5,
    file: str = "model.safetensors",
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    **config_changes: Any,
) -> Path:
    """Write a drafter directory in one of `DRAFTER_LAYOUTS`; `file` ending in .pt writes a plain state dict."""
    path.mkdir(parents=True)
    tensors = drafter_tensors(
        hidden_size=hidden_size, exit_dim=exit_dim, num_layers=num_layers,
        vocab_size=vocab_size, rnn=rnn, seed=seed, dtype=dtype,
    )  # fmt: skip
    write_drafter_config(
        path,
        hidden_size=hidden_size,
        exit_dim=exit_dim,
        num_draft_layers=num_layers,
        rnn=rnn,
        vocab_size=vocab_size,
        draft_len=draft_len,
        **config_changes,
    )
    named = renamed(tensors, layout, num_layers)
    if file.endswith(".safetensors"):
        save_file(named, path / file)
    else:
        torch.save(named, path / file)
    return path


def write_drafter_config(path: Path, **values: Any) -> None:
    config = {"model_type": "recurrent_drafting_drafter", **values}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def write_tied_drafter(
    path: Path,
    *,
    hidden_size: int = 32,
    exit_dim: int = 32,
    num_layers: int = 1,
    vocab_size: int = 96,
    draft_len: int = 5,
    draft_vocab: tuple[int, ...] | None = None,
    seed: int = 1,
) -> Path:
    """A drafter of our own trainer: no LM head; a factor when exit_dim differs from the hidden size."""
    path.mkdir(parents=True)
    tensors = drafter_tensors(
        hidden_size=hidden_size, exit_dim=exit_dim, num_layers=num_layers, vocab_size=vocab_size, seed=seed
    )
    del tensors["lm_head.weight"]
    if exit_dim != hidden_size:
        generator = torch.Generator().manual_seed(seed + 1)
        tensors["lm_head_factor.weight"] = torch.randn(hidden_size, exit_dim, generator=generator) * 0.2
    write_drafter_config(
        path,
        hidden_size=hidden_size,
        exit_dim=exit_dim,
        num_draft_layers=num_layers,
        rnn=True,
        vocab_size=vocab_size,
        draft_len=draft_len,
        tie_lm_head=True,
    )
    save_file(tensors, path / "model.safetensors")
    if draft_vocab is not None:
        save_file({"token_ids": torch.tensor(draft_vocab, dtype=torch.int32)}, path / "draft_vocab.safetensors")
    return path
