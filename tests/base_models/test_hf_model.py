"""Opening model directories: one file, shards, hub caches, and models that transformers wrote itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import FAMILIES, base_config, write_base
from trtllm_redrafter.base_models.hf_model import HFModel
from trtllm_redrafter.base_models.tokenizer import tokenizer_files, tokenizer_sha256
from trtllm_redrafter.errors import InputError


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens(family: str, shards: int, tmp_path: Path) -> None:
    model = HFModel.open(write_base(tmp_path / "m", family, shards=shards))
    assert len([f for f in model.files if f.suffix == ".safetensors"]) == shards
    assert model.config.base_architecture == base_config(family)["architectures"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_written_by_transformers(family: str, tmp_path: Path) -> None:
    """Names, shapes and config keys are those of the installed transformers, whichever generation it is."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family, **{k: v for k, v in base_config(family).items() if k not in ("model_type", "torch_dtype")}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    opened = HFModel.open(tmp_path / "m")
    assert opened.config.dtype == "bfloat16"
    assert set(opened.tensors) == set(model.state_dict())
    assert opened.config.rotary_base == 10000.0


def test_a_hub_cache_snapshot_opens(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "rev", tmp_path / "models--x--y" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(write_base(tmp_path / "real", shards=2).iterdir()):
        file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:064x}")
    assert len(HFModel.open(snapshot).files) == 4


def test_buffers_of_old_exports_are_ignored(tmp_path: Path) -> None:
    path = write_base(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path / "model.safetensors")
    HFModel.open(path)


def test_a_tied_model_may_hold_a_copy_of_its_head_which_is_not_used(tmp_path: Path) -> None:
    path = write_base(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(96, 32)
    save_file(tensors, path / "model.safetensors")
    assert HFModel.open(path).config.tie_word_embeddings


def test_an_untied_model_without_a_head_is_told_about_ties(tmp_path: Path) -> None:
    path = write_base(tmp_path / "m", tie_word_embeddings=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(InputError, match=r"'lm_head.weight' is missing\n.*tie_word_embeddings"):
        HFModel.open(path)


def test_without_a_stated_dtype_the_embedding_decides(tmp_path: Path) -> None:
    path = write_base(tmp_path / "m", torch_dtype="float16")
    config = json.loads((path / "config.json").read_text())
    del config["torch_dtype"]
    (path / "config.json").write_text(json.dumps(config))
    assert HFModel.open(path).config.dtype == "float16"


def test_tokenizer_identity(tmp_path: Path) -> None:
    assert tokenizer_files(tmp_path) == [] and tokenizer_sha256(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_sha256(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_sha256(tmp_path) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert [p.name for p in tokenizer_files(tmp_path)] == ["tokenizer.json", "tokenizer_config.json"]
