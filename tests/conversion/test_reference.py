"""Streaming against a plain in-memory conversion, written down a second time with whole tensors and `chunk`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_models import base_config, base_tensors, drafter_tensors, write_base, write_drafter
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.progress import no_progress


def reference(config: dict[str, Any], rank: int, tp: int, parallel_embedding: bool) -> dict[str, Tensor]:
    """One rank's base tensors: repeat KV heads, pad the vocabulary, chunk, stack."""
    hf = base_tensors(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or config["hidden_size"] // heads

    def rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(tp, dim=0)[rank]

    def repeated(tensor: Tensor) -> Tensor:
        by_head = tensor.reshape(kv_heads, d, *tensor.shape[1:])
        return by_head.repeat_interleave(max(tp // kv_heads, 1), dim=0).flatten(0, 1)

    def padded(tensor: Tensor) -> Tensor:
        missing = -tensor.shape[0] % tp
        return rows(torch.cat([tensor, torch.zeros(missing, tensor.shape[1], dtype=tensor.dtype)]))

    embedding = hf["model.embed_tokens.weight"]
    found = {
        "transformer.vocab_embedding.weight": padded(embedding) if parallel_embedding else embedding,
        "lm_head.weight": padded(hf.get("lm_head.weight", embedding)),
        "transformer.ln_f.weight": hf["model.norm.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}.", f"transformer.layers.{i}."
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" in hf:
                q, k, v = (hf[f"{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv")
                found[f"{ours}attention.qkv.{kind}"] = torch.cat([rows(q), rows(repeated(k)), rows(repeated(v))])
        found[ours + "attention.dense.weight"] = hf[theirs + "self_attn.o_proj.weight"].chunk(tp, dim=1)[rank]
        found[ours + "mlp.fc.weight"] = rows(hf[theirs + "mlp.gate_proj.weight"])
        found[ours + "mlp.gate.weight"] = rows(hf[theirs + "mlp.up_proj.weight"])
        found[ours + "mlp.proj.weight"] = hf[theirs + "mlp.down_proj.weight"].chunk(tp, dim=1)[rank]
        found[ours + "input_layernorm.weight"] = hf[theirs + "input_layernorm.weight"]
        found[ours + "post_layernorm.weight"] = hf[theirs + "post_attention_layernorm.weight"]
        for x in "qk":
            if f"{theirs}self_attn.{x}_norm.weight" in hf:
                found[f"{ours}attention.{x}_layernorm.weight"] = hf[f"{theirs}self_attn.{x}_norm.weight"]
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    tp=st.sampled_from([1, 2, 4, 8]),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.sampled_from([4, 6]),
    vocab=st.integers(8, 40),
    layers=st.integers(1, 2),
    stored=st.sampled_from(["float32", "bfloat16", "float16"]),
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    tied=st.booleans(),
    parallel=st.booleans(),
    with_drafter=st.booleans(),
)
def test_streamed_equals_in_memory(
    tmp_path_factory: pytest.TempPathFactory, family: str, tp: int, kv_heads: int, head_dim: int, vocab: int,
    layers: int, stored: str, dtype: str, tied: bool, parallel: bool, with_drafter: bool,
) -> None:  # fmt: skip
    directory: Path = tmp_path_factory.mktemp("case")
    vocab = vocab // 8 * 8 if with_drafter else vocab
    changes: dict[str, Any] = {
        "num_attention_heads": 8, "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_size": 32,
        "intermediate_size": 16, "vocab_size": vocab, "num_hidden_layers": layers, "torch_dtype": stored,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    base = write_base(directory / "base", family, **changes)
    drafter = write_drafter(directory / "drafter", vocab_size=vocab, exit_dim=16) if with_drafter else None
    options = ConvertOptions(
        base=base, drafter=drafter, output=directory / "out", dtype=dtype, tp_size=tp, num_beams=2, draft_len=2,
        greedy=True, parallel_embedding=parallel, workers=2, overwrite=False,
    )  # fmt: skip
    if drafter is None:
        options = ConvertOptions(**{**vars(options), "num_beams": None, "draft_len": None})
    convert(plan_conversion(options), no_progress)
    target = getattr(torch, stored if dtype == "auto" else dtype)
    for rank in range(tp):
        expected = reference(base_config(family, **changes), rank, tp, parallel)
        if with_drafter:
            tensors = drafter_tensors(vocab_size=vocab, exit_dim=16)
            expected |= {"drafter." + name: tensor.chunk(tp)[rank] for name, tensor in tensors.items()}
        found = load_file(options.output / f"rank{rank}.safetensors")
        assert sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == target and torch.equal(found[name], tensor.to(target)), (rank, name)
