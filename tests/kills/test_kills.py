"""A short campaign with every run of the suite; the long one with `REDRAFTER_KILLS=400 pytest tests/kills`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kills.commands import COMMANDS


def campaign(seed: int, count: int, *commands: str) -> dict[str, Any]:
    """In a process of its own, without threads that a fork could not take along."""
    line = ["--seed", str(seed), "--count", str(count), "--commands", ",".join(commands)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills.campaign", *line], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def test_killed_commands_run_again_by_themselves() -> None:
    found = campaign(3, 21, "convert", "build", "run", "pipeline", "train")
    assert found["failures"] == []
    assert sum(found["cases"].values()) == 21 and min(found["cases"].values()) >= 4
    assert found["operations"]["pipeline"] > 50, "operations are counted"


@pytest.mark.campaign
@pytest.mark.skipif("REDRAFTER_KILLS" not in os.environ, reason="set REDRAFTER_KILLS to the number of kills")
def test_the_long_campaign() -> None:
    seed, count = os.environ.get("REDRAFTER_SEED", "1"), os.environ["REDRAFTER_KILLS"]
    assert campaign(int(seed), int(count), *COMMANDS)["failures"] == []
