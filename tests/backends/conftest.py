"""What tests of the tensorrt-llm backend start from: a stand-in host, and checkpoints to build there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.trtllm_engines import write_checkpoints
from tests.standins.host import Host, make_host


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return make_host(tmp_path / "host", monkeypatch)
