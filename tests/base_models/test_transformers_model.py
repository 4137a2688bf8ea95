"""The base model in transformers is the one that `convert` writes, runs no code of its directory, and is greedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import FAMILIES, LLAMA3_ROPE, write_base
from trtllm_redrafter.base_models.transformers_model import generate, load_model
from trtllm_redrafter.errors import InputError

PROMPT = torch.tensor([[5, 9, 23, 7, 60, 4, 44, 31]])


def change(base: Path, file: str = "config.json", remove: tuple[str, ...] = (), **changes: Any) -> Path:
    path = base / file
    values = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in remove}))
    return base


def logits(base: Path, **options: Any) -> Tensor:
    found: Tensor = load_model(base, dtype=torch.float32, **options)(PROMPT).logits.detach()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_of_a_config_are_one_model(family: str, tmp_path: Path) -> None:
    old = write_base(tmp_path / "old", family, rope_theta=1e6, rope_scaling=LLAMA3_ROPE)
    new = write_base(tmp_path / "new", family)
    other = logits(new)
    change(
        new, remove=("rope_theta", "torch_dtype"), dtype="float32", rope_parameters={"rope_theta": 1e6, **LLAMA3_ROPE}
    )
    assert torch.equal(logits(new), logits(old)) and not torch.equal(logits(old), other)


def test_model_type_and_architectures_each_suffice(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3")
    expected = logits(base)
    assert torch.equal(logits(change(base, architectures=None)), expected)
    change(base, architectures=["Qwen3ForCausalLM"], remove=("model_type",))
    assert torch.equal(logits(base), expected)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", rope_parameters={"rope_theta": 5e5})
    with pytest.raises(InputError, match=r"rope_theta is 10000.0 \(top-level\) and 500000.0 \(rope_parameters\)"):
        load_model(base, dtype=torch.float32)


def greedy(model: Any, count: int) -> list[int]:
    """By the definition: the largest logit, again and again."""
    tokens = PROMPT[0].tolist()
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


WISHES = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 0.6, "top_k": 3,
          "min_new_tokens": 40, "suppress_tokens": list(range(50)), "num_beams": 3, "eos_token_id": 11,
          "forced_eos_token_id": 11, "max_length": 12, "cache_implementation": "static"}  # fmt: skip


@torch.no_grad()
def test_generation_config_changes_nothing(tmp_path: Path) -> None:
    """Neither the file's wishes nor those that old models keep in config.json."""
    base = write_base(tmp_path / "base")
    expected = greedy(load_model(base, dtype=torch.float32), 24)
    assert len(set(expected[8:])) < 24  # a repetition penalty would show
    change(base, "generation_config.json", **WISHES)
    change(base, repetition_penalty=5.0, no_repeat_ngram_size=1)
    model = load_model(base, dtype=torch.float32)
    assert generate(model, PROMPT, max_new_tokens=24, eos=())[0].tolist() == expected
    end = expected[12]
    stopped = generate(model, PROMPT, max_new_tokens=24, eos=(90, end))[0].tolist()
    assert stopped == expected[: expected.index(end, 8) + 1]


@torch.no_grad()
def test_sampling_is_from_the_whole_distribution(tmp_path: Path) -> None:
    base = change(
        write_base(tmp_path / "base"), "generation_config.json", top_k=1, top_p=0.1, min_p=0.9, do_sample=True
    )
    torch.manual_seed(1)
    drawn = generate(load_model(base, dtype=torch.float32), PROMPT, max_new_tokens=60, eos=(), temperature=5.0)
    assert len(set(drawn[0, 8:].tolist())) > 20


def test_code_of_a_model_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    base, mark = write_base(tmp_path / "base"), tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\ndef generate(model, *args, **options): pass\n"
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(code)  # transformers 4 runs this one unasked
    (base / "own.py").write_text(code)
    expected = logits(base)
    change(base, auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    assert torch.equal(logits(base), expected)
    change(base, architectures=["OwnModel"], model_type="own")
    with pytest.raises(InputError, match="transformers cannot load the model"):
        load_model(base, dtype=torch.float32)
    assert not mark.exists()


def without(base: Path, *names: str) -> None:
    tensors = {k: v for k, v in load_file(base / "model.safetensors").items() if k not in names}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    without(base, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match=r"1 tensor\(s\) are missing, such as 'model.layers.1.mlp.up_proj.weight'"):
        load_model(base, dtype=torch.float32)


def test_a_tied_model_with_another_head(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    expected = logits(base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(base), expected)
    assert torch.allclose(logits(base, file_head=True), -expected)
