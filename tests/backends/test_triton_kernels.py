"""The GPU's kernels without a GPU: Triton interprets them, where it is installed. `tests/gpu` runs the same cases."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with PyTorch for CUDA"
)
def test_kernels_are_float32s() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported, so not in this process
    command = [sys.executable, "-m", "tests.kernel_cases"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found["attention"]) < 2e-3 and found["pointwise"] < 2e-3, found
