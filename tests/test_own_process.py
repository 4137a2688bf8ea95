"""The plugin that gives each test of a real engine its own process: whatever one does, the others run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUITE = """
import os, signal, time
import pytest

pytestmark = pytest.mark.own_process
held = []

@pytest.fixture
def shared():
    from pathlib import Path
    return Path(os.environ["REDRAFTER_TEST_SHARED"], "parents")

def test_first(shared):
    shared.write_text(str(os.getpid()))
    held.append("memory")

def test_fails():
    held.append("memory")
    assert held == [], "said by the child"

def test_dies():
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

@pytest.mark.own_process(seconds=2)
def test_hangs():
    time.sleep(600)

@pytest.mark.skip(reason="no second GPU")
def test_is_skipped():
    pass

def test_last(shared):
    assert held == [] and shared.read_text() not in ("", str(os.getpid()))
"""


def test_every_test_has_its_own_process(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("REDRAFTER_TEST")}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.conftest", "-rA", "-q", "test_suite.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    out = done.stdout
    assert done.returncode == 1 and ".FFFs." in out, out + done.stderr
    for name in ("test_first", "test_last"):
        assert f"PASSED test_suite.py::{name}" in out
    assert "said by the child" in out and "no second GPU" in out
    assert "exit code -11" in out and "last words" in out and "was ended after 2 seconds" in out
