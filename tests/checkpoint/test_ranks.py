"""Rank files that were copied twice, exchanged or taken from another checkpoint: their values tell."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engines import build_engine, write_checkpoint
from trtllm_redrafter.backends.torch.backend import TorchBackend
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.safetensors_io import save_tensors
from trtllm_redrafter.checkpoint.structure import rank_problems
from trtllm_redrafter.errors import InputError, raise_together
from trtllm_redrafter.verify.files import verify_files


def found(path: Path) -> list[str]:
    return [problem.render() for problem in rank_problems(Checkpoint.open(path))]


def swap(path: Path, a: int = 0, b: int = 1) -> None:
    one, other = path / f"rank{a}.safetensors", path / f"rank{b}.safetensors"
    one.rename(path / "aside")
    other.rename(one)
    (path / "aside").rename(other)


@pytest.mark.parametrize("changes", [{}, {"tp_size": 2, "num_key_value_heads": 1}, {"tp_size": 4}], ids=str)
def test_ranks_as_they_were_written(changes: dict[str, int], tmp_path: Path) -> None:
    assert found(write_checkpoint(tmp_path, **changes)) == []  # type: ignore[arg-type]


def test_a_doubled_rank(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tp_size=2)
    (path / "manifest.json").unlink()
    shutil.copyfile(path / "rank0.safetensors", path / "rank1.safetensors")
    assert ["the same part of every tensor as rank0" in line for line in found(path)] == [True]
    with pytest.raises(InputError, match="the same part of every tensor"):
        build_engine(path, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    assert "the same part" in verify_files(path, hashes=True).render()


def test_a_rank_of_another_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", tp_size=2)
    other = write_checkpoint(tmp_path / "b", tp_size=2, intermediate_size=48, rope_theta=5.0)
    tensors = load_file(other / "rank1.safetensors")
    tensors["transformer.ln_f.weight"] *= 2
    save_tensors(path / "rank1.safetensors", tensors)
    assert "'transformer.ln_f.weight' is not the same as in rank0" in "\n".join(found(path))


def test_exchanged_ranks_of_a_tied_head(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tp_size=2, tie_word_embeddings=True)
    swap(path)
    assert "'lm_head.weight' is the part of rank 1, not of rank 0" in found(path)[0]


def test_exchanged_ranks_that_share_no_kv_head(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tp_size=4, num_key_value_heads=2)
    swap(path, 1, 2)
    assert any("does not share its KV head" in line for line in found(path))


def test_values_in_the_padding(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, drafter=False, tp_size=2, vocab_size=63)
    swap(path)
    assert any("where the vocabulary's padding should be" in line for line in found(path))


def test_zeros_tell_nothing(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tp_size=2)
    for rank in range(2):
        file = path / f"rank{rank}.safetensors"
        save_tensors(file, {name: torch.zeros_like(t) for name, t in load_file(file).items()})
    assert found(path) == []


def edit_load(engine: Path) -> None:
    TorchBackend().load(engine, device="cpu", verify_hashes=False)


def edit_verify(engine: Path) -> None:
    raise_together(InputError, verify_files(engine, hashes=False).problems, "damaged", where=engine)


@pytest.mark.parametrize("look", [edit_load, edit_verify])
def test_exchanged_ranks_are_told_by_the_manifest(look: Callable[[Path], None], tmp_path: Path) -> None:
    """An untied model's ranks have no mark of their own; a sample of the file in the manifest does it at every load."""
    path = write_checkpoint(tmp_path, tp_size=2)
    engine = build_engine(path, tmp_path / "engine")
    assert Manifest.read(engine).files["checkpoint/rank0.safetensors"].sample_sha256
    look(engine)
    swap(engine / "checkpoint")
    assert found(engine / "checkpoint") == []
    with pytest.raises(Exception, match=r"holds what checkpoint/rank1.safetensors should"):
        look(engine)
