"""Signals where they are hard to take: twice, inside a destructor, while cleaning up."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PLACES = {
    "twice": "os.kill(os.getpid(), number); os.kill(os.getpid(), number)",
    "in a destructor": """
class Last:
    def __del__(self):
        os.kill(os.getpid(), number)
        sum(range(10))
last = Last()
del last
time.sleep(20)
""",
    "while cleaning up": """
real = shutil.rmtree
def rmtree(*args, **kwargs):
    os.kill(os.getpid(), number)
    real(*args, **kwargs)
shutil.rmtree = rmtree
os.kill(os.getpid(), number)
""",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_ends_in_one_word(place: str, models: Path, tmp_path: Path) -> None:
    script = f"""
import os, shutil, signal, sys, time
import trtllm_redrafter.conversion.writer as writer
from trtllm_redrafter.cli import main
number = signal.SIGTERM
def write_ranks(plan, work, progress):
    (work / "half").write_text("written")
    exec({PLACES[place]!r}, globals())
writer._write_ranks = write_ranks
sys.argv[1:] = ["convert", "--base", {str(models / "base")!r}, "--output", {str(tmp_path / "out")!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["doctor", "--json"]])
def test_a_stdout_that_is_full(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "trtllm_redrafter", *arguments]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5 and "error: the disk is full" in done.stderr and "Traceback" not in done.stderr
