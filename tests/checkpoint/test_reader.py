"""Opening checkpoints of every origin, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import BackendError, InputError

PEER = Path(__file__).parents[1] / "data" / "peer"
EXPECTED = PEER / "expected"


def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXPECTED / name, tmp_path / name))


def edit(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(("name", "hf"), [("llama-gqa-bf16-tp2", "llama-gqa"), ("qwen2-bf16-tp2", "qwen2")])
def test_joined_values(name: str, hf: str) -> None:
    checkpoint = Checkpoint.open(EXPECTED / name)
    model = load_file(PEER / "hf" / hf / "model.safetensors")
    attention = "model.layers.1.self_attn."
    qkv = torch.cat([model[f"{attention}{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(checkpoint.load("transformer.layers.1.attention.qkv.weight"), qkv)
    assert torch.equal(checkpoint.load("lm_head.weight"), model["lm_head.weight"])
    assert checkpoint.load_stored("lm_head.weight").shape == (1001, 64)
    assert checkpoint.manifest is None


def test_one_rank_is_read_without_copying() -> None:
    checkpoint = Checkpoint.open(EXPECTED / "qwen3-bf16")
    name = "transformer.vocab_embedding.weight"
    assert checkpoint.load(name).data_ptr() == checkpoint.load(name).data_ptr()


def test_fp8_scale_is_applied() -> None:
    fp8 = Checkpoint.open(EXPECTED / "llama-gqa-fp8-kvfp8-bf16-tp2")
    exact = Checkpoint.open(EXPECTED / "llama-gqa-bf16")
    for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
        name = f"transformer.layers.0.{module}.weight"
        a, b = fp8.load(name), exact.load(name)
        assert a.dtype == torch.bfloat16
        assert torch.allclose(a.float(), b.float(), rtol=2**-3, atol=2e-3)
        assert not torch.equal(a, b)
    assert fp8.load("transformer.layers.0.mlp.fc.weights_scaling_factor").dtype == torch.float32


def test_other_quantized_weights_are_refused_with_one_message() -> None:
    awq = Checkpoint.open(EXPECTED / "llama-awq-int4_awq-bf16")
    with pytest.raises(BackendError, match="quantized as W4A16_AWQ") as e:
        awq.load("transformer.layers.0.mlp.fc.weight")
    assert e.value.problem.remedy
    assert awq.load("lm_head.weight").dtype == torch.bfloat16


def test_a_tied_head_may_be_left_out(tmp_path: Path) -> None:
    path = copy("llama-gqa-bf16", tmp_path)
    edit(path, tie_word_embeddings=True)
    tensors = load_file(path / "rank0.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "rank0.safetensors")
    checkpoint = Checkpoint.open(path)
    assert "lm_head.weight" in checkpoint.names()
    assert torch.equal(checkpoint.load("lm_head.weight"), tensors["transformer.vocab_embedding.weight"])
    edit(path, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"no tensor 'lm_head.weight'"):
        Checkpoint.open(path).load("lm_head.weight")


def test_ranks_that_do_not_fit_each_other(tmp_path: Path) -> None:
    path = copy("llama-gqa-bf16-tp2", tmp_path)
    tensors = load_file(path / "rank1.safetensors")
    tensors["transformer.layers.0.mlp.fc.weight"] = tensors["transformer.layers.0.mlp.fc.weight"][:-1].contiguous()
    save_file(tensors, path / "rank1.safetensors")
    with pytest.raises(InputError, match="does not fit the other ranks") as e:
        Checkpoint.open(path).load("transformer.layers.0.mlp.fc.weight")
    assert "rank1.safetensors" in str(e.value)


def test_missing_rank_file(tmp_path: Path) -> None:
    path = copy("llama-gqa-bf16-tp2", tmp_path)
    (path / "rank1.safetensors").unlink()
    with pytest.raises(InputError, match=r"rank1.safetensors: cannot read"):
        Checkpoint.open(path)


def test_pipeline_parallelism_is_refused(tmp_path: Path) -> None:
    path = copy("llama-gqa-bf16-tp2", tmp_path)
    edit(path, mapping={"world_size": 2, "tp_size": 1, "pp_size": 2})
    with pytest.raises(InputError, match="only tensor parallelism"):
        Checkpoint.open(path)


@pytest.mark.parametrize(("directory", "part"), [("hf/qwen3", "Hugging Face model"), ("nowhere", "does not exist")])
def test_what_is_not_a_checkpoint(directory: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        Checkpoint.open(PEER / directory)
