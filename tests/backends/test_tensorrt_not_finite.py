"""NaN and infinity in the tensorrt backend's networks: the tests of the torch backend's executors, on onnxruntime."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("onnx", reason="the tensorrt backend needs onnx: pip install -e '.[dev]'")
pytest.importorskip("onnxruntime", reason="its networks are executed by onnxruntime: pip install -e '.[dev]'")

from tests.backends import test_not_finite as others
from tests.backends.tensorrt_engines import build_without_compiler, load
from trtllm_redrafter.backends.base import SamplingParams

NAME = "onnxruntime"


@pytest.fixture(autouse=True)
def executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of the torch backend make these runners."""

    def on_onnxruntime(engine: Path) -> Any:
        with patch("trtllm_redrafter.checkpoint.structure.non_finite_count", return_value=0):
            runner = load(build_without_compiler(engine.parent / "checkpoint", engine.parent / "steps"))
        vars(runner)["executor"] = SimpleNamespace(name=NAME)
        return runner

    monkeypatch.setitem(others.EXECUTORS, NAME, ("float32", on_onnxruntime))


@pytest.mark.parametrize("sampling", [others.GREEDY, others.SAMPLED], ids=["greedy", "sampled"])
def test_a_text_fails_where_its_numbers_end(tmp_path: Path, sampling: SamplingParams) -> None:
    others.test_a_text_fails_where_its_numbers_end(tmp_path, NAME, sampling)


def test_a_prompt_fails_at_once(tmp_path: Path) -> None:
    others.test_a_prompt_fails_at_once(tmp_path, NAME)


@pytest.mark.parametrize("value", [others.NAN, others.INF, -others.INF])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_wherever_the_damage_is(tmp_path: Path, name: str, value: float) -> None:
    others.test_wherever_the_damage_is(tmp_path, NAME, name, value)


def test_a_broken_drafter_changes_no_text_and_is_named(tmp_path: Path) -> None:
    others.test_a_broken_drafter_changes_no_text_and_is_named(tmp_path, NAME)
