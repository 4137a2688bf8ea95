"""A LLaMA-like family is one row of the table, and every name of a checkpoint has its Hugging Face tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines import build_engine
from tests.tiny_models import base_config, write_base, write_drafter
from trtllm_redrafter.base_models.hf_config import parse_hf_config
from trtllm_redrafter.base_models.hf_model import HFModel, tensor_sources
from trtllm_redrafter.checkpoint.families import FAMILIES, Family
from trtllm_redrafter.checkpoint.names import hf_names, rank_file
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.verify.weights import verify

LYNX = Family(
    "Lynx", "LynxForCausalLM", "lynx", "llama", attn_bias=False, mlp_bias=False, qk_norm=True,
    default_head_dim=16,
)  # fmt: skip
"""LLaMA's tensors with the head size and the norms of Qwen3: a family that nothing in the package names."""


def checkpoint(base: Path, output: Path, drafter: Path | None) -> Path:
    options = ConvertOptions(
        base=base, drafter=drafter, output=output, dtype="auto", tp_size=2, num_beams=None, draft_len=None,
        greedy=True, parallel_embedding=False, workers=1, overwrite=False,
    )  # fmt: skip
    return convert(plan_conversion(options), no_progress)


def test_a_new_family_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted, verified, read again and built, with the same bytes as the family whose tensors it has."""
    qwen3 = write_base(tmp_path / "qwen3", "qwen3")
    base = write_base(tmp_path / "base", "qwen3")
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["LynxForCausalLM"], "model_type": "lynx"}
    del config["head_dim"]
    (base / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(FAMILIES, LYNX.architecture, LYNX)
    drafter = write_drafter(tmp_path / "drafter")
    ours, theirs = (checkpoint(b, tmp_path / f"{b.name}-out", drafter) for b in (base, qwen3))
    for rank in range(2):
        assert rank_file(ours, rank).read_bytes() == rank_file(theirs, rank).read_bytes()
    found = Checkpoint.open(ours).config
    assert (found.architecture, found.base_architecture) == ("ReDrafterForLLaMALM", "LynxForCausalLM")
    assert found.has_qk_norm and found.head_size == 16 and found.qwen_type is None
    assert verify(ours, against=base, drafter=drafter, hashes=True, progress=no_progress).ok
    assert build_engine(ours, tmp_path / "engine").is_dir()
    assert Checkpoint.open(checkpoint(base, tmp_path / "plain", None)).config.architecture == "LynxForCausalLM"


def test_model_type_finds_the_family_where_architectures_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = base_config("qwen3", model_type="lynx", architectures=None)
    assert "not supported" in parse_hf_config(raw, where=tmp_path).problems[0].what
    monkeypatch.setitem(FAMILIES, LYNX.architecture, LYNX)
    parsed = parse_hf_config(raw, where=tmp_path)
    assert parsed.config is not None and parsed.config.base_architecture == LYNX.architecture


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sources_are_all_tensors_of_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = HFModel.open(write_base(tmp_path / "m", family, tie_word_embeddings=tied, **biases))
    sources = tensor_sources(model.config)
    assert {name for names in sources.values() for name in names} == set(model.tensors)
    assert sources["lm_head.weight"] == ("model.embed_tokens.weight" if tied else "lm_head.weight",)


def test_names_beside_hugging_faces() -> None:
    layer = "model.layers.11."
    assert hf_names("transformer.layers.11.attention.qkv.bias") == (
        layer + "self_attn.q_proj.bias", layer + "self_attn.k_proj.bias", layer + "self_attn.v_proj.bias",
    )  # fmt: skip
    assert hf_names("transformer.layers.11.mlp.fc.weight") == (layer + "mlp.gate_proj.weight",)
    assert hf_names("transformer.ln_f.weight") == ("model.norm.weight",)
