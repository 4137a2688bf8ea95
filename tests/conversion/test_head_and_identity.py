"""Which LM head a tied base has, and whether the drafter was trained for this base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.conftest import Convert, Options
from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.base_models.hf_model import sample_of
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.errors import InputError, MismatchError, UsageError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.run import api
from trtllm_redrafter.verify.tokens import greedy_parity
from trtllm_redrafter.verify.weights import verify


def tied_base(path: Path, *, head: torch.Tensor | None = None, copy: bool = False) -> Path:
    """A tied model whose file has the given LM head, or a copy of the embedding."""
    base = write_base(path, tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    if copy:
        head = tensors["model.embed_tokens.weight"].clone()
    if head is not None:
        tensors["lm_head.weight"] = head
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def trained_head() -> torch.Tensor:
    return torch.randn(96, 32, generator=torch.Generator().manual_seed(5)) * 0.2


def test_another_head_in_a_tied_models_file_is_said(tmp_path: Path, options: Options) -> None:
    plain = tied_base(tmp_path / "plain")
    copied = tied_base(tmp_path / "copied", copy=True)
    other = tied_base(tmp_path / "other", head=trained_head())
    shorter = tied_base(tmp_path / "shorter", head=torch.zeros(7, 32))
    said = {base.name: "another lm_head.weight" in plan_conversion(options(base)).render()
            for base in (plain, copied, other, shorter)}  # fmt: skip
    assert said == {"plain": False, "copied": False, "other": True, "shorter": True}
    chosen = plan_conversion(options(other, lm_head="embedding"))
    assert "another lm_head" not in chosen.render() and chosen.config.tie_word_embeddings


def test_the_files_head_is_taken_when_chosen(tmp_path: Path, run: Convert) -> None:
    base = tied_base(tmp_path / "base", head=trained_head())
    tied = run(base, output=tmp_path / "tied")
    chosen = run(base, write_drafter(tmp_path / "drafter"), output=tmp_path / "chosen", lm_head="file", num_beams=2)
    assert torch.equal(tied.load("lm_head.weight"), tied.load("transformer.vocab_embedding.weight"))
    assert torch.equal(chosen.load("lm_head.weight"), trained_head()) and not chosen.config.tie_word_embeddings
    for checkpoint in (tied, chosen):  # values, and the tokens of transformers with the same head
        assert verify(checkpoint.path, against=base, hashes=True, progress=no_progress).ok
        assert greedy_parity(checkpoint.path, base).problems == ()


def test_the_choice_from_the_api(tmp_path: Path) -> None:
    base = tied_base(tmp_path / "base", head=trained_head())
    api.convert(base, tmp_path / "checkpoint", lm_head="file")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with pytest.raises(UsageError, match="lm_head"):
        api.convert(base, tmp_path / "other", lm_head="both")


def test_choices_that_are_not_there(tmp_path: Path, options: Options) -> None:
    with pytest.raises(InputError, match=r"'lm_head.weight' is missing"):
        plan_conversion(options(tied_base(tmp_path / "tied"), lm_head="file"))
    with pytest.raises(InputError, match=r"'lm_head.weight' has the wrong shape"):
        plan_conversion(options(tied_base(tmp_path / "short", head=torch.zeros(7, 32)), lm_head="file"))
    with pytest.raises(MismatchError, match="LM head is not its embedding"):
        plan_conversion(options(write_base(tmp_path / "untied"), lm_head="embedding"))


def test_a_drafter_of_another_base_is_said(tmp_path: Path, options: Options) -> None:
    base, twin = write_base(tmp_path / "base"), write_base(tmp_path / "twin", seed=1)
    sharded = write_base(tmp_path / "sharded", shards=3)
    identity = {"name": "the-base", "weights_sample": sample_of(base)}
    drafter = write_drafter(tmp_path / "drafter", base_model=identity)
    assert sample_of(base) == sample_of(sharded) != sample_of(twin)
    assert sample_of(tmp_path) is None
    for same in (base, sharded):
        assert "trained for" not in plan_conversion(options(same, drafter)).render()
    text = plan_conversion(options(twin, drafter)).render()
    assert "warning: the drafter was trained for the-base, whose weights are not this base's" in text
    assert "trained for the-base" not in plan_conversion(options(twin, write_drafter(tmp_path / "old"))).render()


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.drafter."])
@pytest.mark.parametrize("layout", ["apple", "ours"])
def test_wrappers_in_drafters_names_are_stripped(
    layout: str, prefix: str, file: str, tmp_path: Path, run: Convert
) -> None:
    base = write_base(tmp_path / "base")
    plain = write_drafter(tmp_path / "plain", layout=layout)
    wrapped = write_drafter(tmp_path / "wrapped", layout=layout, file=file)
    tensors = {prefix + name: tensor for name, tensor in load_file(plain / "model.safetensors").items()}
    save_file(tensors, wrapped / file) if file.endswith("safetensors") else torch.save(tensors, wrapped / file)
    found = run(base, wrapped, output=tmp_path / "out")
    expected = run(base, plain, output=tmp_path / "expected")
    assert (found.path / "rank0.safetensors").read_bytes() == (expected.path / "rank0.safetensors").read_bytes()


def test_wrapped_and_plain_names_together_are_refused(tmp_path: Path, options: Options) -> None:
    drafter = write_drafter(tmp_path / "drafter")
    tensors = load_file(drafter / "model.safetensors")
    save_file(tensors | {"module.rnn_w.weight": tensors["rnn_w.weight"].clone()}, drafter / "model.safetensors")
    with pytest.raises(InputError, match=r"is a second 'rnn_w.weight'"):
        plan_conversion(options(write_base(tmp_path / "base"), drafter))
