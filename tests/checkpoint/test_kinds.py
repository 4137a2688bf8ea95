"""One rule for what a directory is, and for the message when it is something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines import build_engine, write_checkpoint
from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.checkpoint.kinds import Kind, kind_at, kind_of, wrong_kind


def test_what_the_commands_write_and_read(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    assert kind_at(checkpoint) is Kind.CHECKPOINT
    assert kind_at(build_engine(checkpoint, tmp_path / "engine")) is Kind.TORCH_ENGINE
    assert kind_at(write_base(tmp_path / "b")) is Kind.BASE_MODEL
    assert kind_at(write_drafter(tmp_path / "d")) is Kind.DRAFTER


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"pretrained_config": {}, "build_config": {}}, Kind.TENSORRT_ENGINE),
        ({"model_type": "recurrent_drafter", "exit_dim": 8}, Kind.DRAFTER),  # as Apple writes it
        ({"architectures": ["LlamaForCausalLM"]}, Kind.BASE_MODEL),
        ({"hidden_size": 4}, None),
    ],
)
def test_others(config: dict[str, Any], kind: Kind | None) -> None:
    assert kind_of(config) is kind


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        ({"backend": "torch"}, Kind.CHECKPOINT, "this is an engine, not a checkpoint"),
        ({"pretrained_config": {}}, Kind.CHECKPOINT, "pass the checkpoint it was built from"),
        ({"architecture": "x"}, Kind.TORCH_ENGINE, "build --checkpoint"),
        ({"exit_dim": 1}, Kind.CHECKPOINT, "has the key `exit_dim`"),
        ({}, Kind.TORCH_ENGINE, "this is not an engine"),
        ({"a": 1}, None, "this is not a model, drafter, checkpoint or engine"),
    ],
)
def test_messages(config: dict[str, Any], wanted: Kind | None, message: str) -> None:
    assert message in wrong_kind(Path("somewhere"), config, wanted).render()
