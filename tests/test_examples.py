"""The scripts in examples/ run as their headers say, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / ".cache" / "smollm2-135m-instruct"


def example(name: str, *arguments: str) -> str:
    """What the script prints; it must end well and say nothing on stderr but warnings of libraries."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_the_algorithm_alone() -> None:
    text = example("algorithm.py")
    assert "accepted" in text and "root" in text
    found = re.search(r"the same 60 tokens, in (\d+) steps instead of 59", text)
    assert found and int(found[1]) < 59


def test_a_drafter_is_trained_and_measured() -> None:
    text = example("train_drafter.py")
    engine = re.search(r"^engine at 3x4: +([0-9.]+) tokens per step", text, re.M)
    said = re.search(r"^evaluate said: +([0-9.]+)", text, re.M)
    assert engine and said, text
    assert abs(float(engine[1]) - float(said[1])) <= 0.05 and float(engine[1]) > 3.0


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2, made by `make demo`")
def test_a_real_model_through_the_python_api() -> None:
    text = example("generate.py", "--max-tokens", "24")
    assert re.search(r"\[\d+ tokens in \d+ steps: [1-9]\.\d\d per step", text)
    assert re.search(r"the same \d+ tokens without and with drafting", text)
