from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.tiny import Program, write_models
from trtllm_redrafter.run import api


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `base` and `drafter`; tests do not write into it."""
    path = tmp_path_factory.mktemp("models")
    write_models(path)
    return path


@pytest.fixture(scope="session")
def artefacts(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `checkpoint`, `engine` and the drafterless `plain`; tests do not write into it."""
    path = tmp_path_factory.mktemp("artefacts")
    api.convert(models / "base", path / "checkpoint", drafter=models / "drafter", num_beams=2)
    api.build(path / "checkpoint", path / "engine", max_seq_len=128, max_batch_size=2)
    api.convert(models / "base", path / "plain-checkpoint")
    api.build(path / "plain-checkpoint", path / "plain", max_seq_len=128)
    return path
