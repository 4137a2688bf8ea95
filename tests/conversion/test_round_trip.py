"""Hugging Face → rank files → joined again: every value of every family, and of every drafter layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conversion.conftest import Convert
from tests.engines import write_tokenizer
from tests.tiny_models import (
    DRAFTER_LAYOUTS,
    FAMILIES,
    LLAMA3_ROPE,
    base_config,
    base_tensors,
    drafter_tensors,
    write_base,
    write_drafter,
    write_tied_drafter,
)
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.verify.weights import verify

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3_ROPE}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-odd-vocabulary": ("llama", {"vocab_size": 97}),
    "qwen2-tied-bf16": ("qwen2", {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}),
    "qwen3-fp16": ("qwen3", {"torch_dtype": "float16"}),
    "mistral-wide-heads": ("mistral", {"head_dim": 24}),
}


def assert_equals_model(checkpoint: Checkpoint, family: str, changes: dict[str, Any]) -> None:
    """Every joined tensor is the Hugging Face tensor, or the stack of them."""
    config = base_config(family, **changes)
    hf = base_tensors(config)
    expected = {
        "transformer.vocab_embedding.weight": hf.pop("model.embed_tokens.weight"),
        "transformer.ln_f.weight": hf.pop("model.norm.weight"),
    }
    expected["lm_head.weight"] = hf.pop("lm_head.weight", expected["transformer.vocab_embedding.weight"])
    ours = {"mlp.gate_proj": "mlp.fc", "mlp.up_proj": "mlp.gate", "mlp.down_proj": "mlp.proj",
            "self_attn.o_proj": "attention.dense", "self_attn.q_norm": "attention.q_layernorm",
            "self_attn.k_norm": "attention.k_layernorm", "post_attention_layernorm": "post_layernorm",
            "input_layernorm": "input_layernorm"}  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [hf.pop(f"model.layers.{i}.self_attn.{x}_proj.{kind}", None) for x in "qkv"]
            if parts[0] is not None:
                expected[f"transformer.layers.{i}.attention.qkv.{kind}"] = torch.cat(
                    [p for p in parts if p is not None]
                )
            for theirs, name in ours.items():
                tensor = hf.pop(f"model.layers.{i}.{theirs}.{kind}", None)
                if tensor is not None:
                    expected[f"transformer.layers.{i}.{name}.{kind}"] = tensor
    assert hf == {}
    assert sorted(n for n in checkpoint.names() if not n.startswith("drafter.")) == sorted(expected)
    for name, tensor in expected.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), name
        assert checkpoint.load_stored(name).shape == tensor.shape


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_base_round_trip(variant: str, tp_size: int, tmp_path: Path, run: Convert) -> None:
    family, changes = VARIANTS[variant]
    base = write_base(tmp_path / "base", family, shards=1 + tp_size // 2, **changes)
    checkpoint = run(base, tp_size=tp_size, parallel_embedding=tp_size == 4)
    assert checkpoint.config.tp_size == tp_size
    assert_equals_model(checkpoint, family, changes)
    report = verify(checkpoint.path, against=base, hashes=True, progress=no_progress)
    assert report.ok, report.render()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_drafter(family: str, tp_size: int, tmp_path: Path, run: Convert) -> None:
    base = write_base(tmp_path / "base", family)
    drafter = write_drafter(tmp_path / "drafter", exit_dim=48)
    checkpoint = run(base, drafter, tp_size=tp_size)
    assert_equals_model(checkpoint, family, {})
    for name, tensor in drafter_tensors(exit_dim=48).items():
        assert torch.equal(checkpoint.load("drafter." + name), tensor), name
    config = checkpoint.config
    assert config.architecture == ("ReDrafterForQWenLM" if "qwen" in family else "ReDrafterForLLaMALM")
    assert config.drafter is not None and config.drafter.exit_dim == 48
    report = verify(checkpoint.path, against=base, hashes=True, progress=no_progress)
    assert report.ok, report.render()


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize("exit_dim", [64, 48])
@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("layout", DRAFTER_LAYOUTS)
def test_drafter_layouts(layout: str, file: str, exit_dim: int, rnn: bool, tmp_path: Path, run: Convert) -> None:
    base = write_base(tmp_path / "base")
    drafter = write_drafter(tmp_path / "drafter", layout=layout, file=file, exit_dim=exit_dim, rnn=rnn)
    checkpoint = run(base, drafter, tp_size=2)
    for name, tensor in drafter_tensors(exit_dim=exit_dim, rnn=rnn).items():
        assert torch.equal(checkpoint.load("drafter." + name), tensor), name


def test_a_drafter_of_another_dtype_is_cast_to_the_checkpoints(tmp_path: Path, run: Convert) -> None:
    base = write_base(tmp_path / "base", torch_dtype="bfloat16")
    for dtype in (torch.float16, torch.float32):
        drafter = write_drafter(tmp_path / str(dtype), dtype=dtype)
        checkpoint = run(base, drafter, overwrite=True)
        for name, tensor in drafter_tensors(dtype=dtype).items():
            assert torch.equal(checkpoint.load("drafter." + name), tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_casts_are_plain_casts(stored: str, dtype: str, tmp_path: Path, run: Convert) -> None:
    base = write_base(tmp_path / "base", "qwen2", torch_dtype=stored)
    checkpoint = run(base, dtype=dtype, tp_size=2)
    hf = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(checkpoint.load("transformer.layers.1.mlp.proj.weight"), hf[name].to(getattr(torch, dtype)))
    assert checkpoint.config.dtype == dtype


@pytest.mark.parametrize("tied_base", [True, False])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_tied_drafter_head_is_the_bases(tp_size: int, tied_base: bool, tmp_path: Path, run: Convert) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=tied_base)
    checkpoint = run(base, write_tied_drafter(tmp_path / "drafter"), tp_size=tp_size)
    assert torch.equal(checkpoint.load("drafter.lm_head.weight"), checkpoint.load("lm_head.weight"))
    assert checkpoint.config.drafter is not None and checkpoint.config.drafter.exit_dim == 32


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_factored_drafter_head_is_multiplied_out(tp_size: int, tmp_path: Path, run: Convert) -> None:
    """The product is taken in float32 and cast once, and has the same bits on every number of ranks."""
    vocab = 2500  # more than two blocks of the multiplication
    base = write_base(tmp_path / "base", torch_dtype="bfloat16", vocab_size=vocab)
    drafter = write_tied_drafter(tmp_path / "drafter", exit_dim=16, vocab_size=vocab)
    checkpoint = run(base, drafter, tp_size=tp_size)
    factor = load_file(drafter / "model.safetensors")["lm_head_factor.weight"]
    exact = checkpoint.load("lm_head.weight").double() @ factor.double()
    found = checkpoint.load("drafter.lm_head.weight")
    assert found.dtype == torch.bfloat16 and found.shape == (vocab, 16)
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-6)
    single = run(base, drafter, tp_size=1, overwrite=True)
    assert torch.equal(found, single.load("drafter.lm_head.weight"))


def test_draft_vocab_travels(tmp_path: Path, run: Convert) -> None:
    base = write_base(tmp_path / "base")
    drafter = write_tied_drafter(tmp_path / "drafter", draft_vocab=(7, 3, 95))
    checkpoint = run(base, drafter)
    assert load_file(checkpoint.path / "draft_vocab.safetensors")["token_ids"].tolist() == [7, 3, 95]
    assert checkpoint.manifest is not None and "draft_vocab.safetensors" in checkpoint.manifest.files


def test_tokenizer_files_travel(tmp_path: Path, run: Convert) -> None:
    base = write_base(tmp_path / "base")
    write_tokenizer(base, 96)
    (base / "tokenizer_config.json").unlink()
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "README.md").write_text("not copied")
    checkpoint = run(base)
    found = sorted(p.name for p in (checkpoint.path / "tokenizer").iterdir())
    assert found == ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
    manifest = checkpoint.manifest
    assert manifest is not None
    assert manifest.tokenizer_sha256 == manifest.files["tokenizer/tokenizer.json"].sha256
    assert manifest.derived["eos_token_ids"] == [2]


def test_the_manifest_knows_inputs_and_outputs(tmp_path: Path, run: Convert) -> None:
    base = write_base(tmp_path / "base", shards=2)
    drafter = write_drafter(tmp_path / "drafter_n_4_lr", draft_len=None)
    checkpoint = run(base, drafter, tp_size=2, num_beams=3)
    raw = json.loads((checkpoint.path / "manifest.json").read_text())
    import hashlib

    for role, directory in (("base", base), ("drafter", drafter)):
        for name, record in raw["inputs"][role]["files"].items():
            assert record["sha256"] == hashlib.sha256((directory / name).read_bytes()).hexdigest()
    assert set(raw["inputs"]["base"]["files"]) == {
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }  # fmt: skip
    written = {p.relative_to(checkpoint.path).as_posix() for p in checkpoint.path.rglob("*") if p.is_file()}
    assert set(raw["files"]) == written - {"manifest.json"}
    assert (raw["derived"]["trained_draft_len"], raw["options"]["num_beams"]) == (4, 3)
    assert checkpoint.config.draft_shape == DraftShape(3, 4)
    assert raw["options"]["tp_size"] == 2


def test_same_bytes_with_any_number_of_workers(tmp_path: Path, run: Convert) -> None:
    base, drafter = write_base(tmp_path / "base"), write_drafter(tmp_path / "drafter")
    contents = []
    for workers in (1, 4):
        out = run(base, drafter, tp_size=4, workers=workers, overwrite=True).path
        contents.append([(out / f"rank{r}.safetensors").read_bytes() for r in range(4)])
    assert contents[0] == contents[1]
