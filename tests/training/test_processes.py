"""Two processes on one machine: they stay together, and learn from every window of a step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training.conftest import train_options
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.training.execute import train
from trtllm_redrafter.training.plan import plan_training

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
from pathlib import Path
from tests.training.conftest import train_options
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.training.plan import plan_training
from trtllm_redrafter.training.execute import train
options = train_options(Path(sys.argv[1]), Path(sys.argv[2]), windows=2, full_windows=2)
train(plan_training(options), no_progress)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_share_the_windows(counting_base: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    two = tmp_path / "two"
    train_options(counting_base, two)  # writes the prompts
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    arguments = [*command, str(tmp_path / "program.py"), str(counting_base), str(two)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    four = weights(counting_base, tmp_path / "four", windows=4)
    together = load_file(two / "drafter" / "model.safetensors")
    for name in four:
        torch.testing.assert_close(together[name], four[name], atol=2e-3, rtol=1e-2)


def weights(base: Path, folder: Path, windows: int) -> dict[str, Tensor]:
    """Of a run in this process alone."""
    options = train_options(base, folder, windows=windows, full_windows=windows)
    train(plan_training(options), no_progress)
    return load_file(options.output / "model.safetensors")
