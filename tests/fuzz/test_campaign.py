"""Broken inputs end in a message: no traceback, crash, hang or half-written output, whatever the command.

The campaign forks for each mutation, so it runs in a process of its own: a fork of this one, whose other tests have
left threads, can hang.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

MUTATIONS = 120
"""About a minute on one core; another set than the long campaign's, and the same one every time."""


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "tests.fuzz.campaign", *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_minute_of_mutations() -> None:
    """And every command on inputs that are not broken, else the mutations would break what nothing reads."""
    totals = run("--intact", "--seed", 0, "--mutations", MUTATIONS)
    assert f"{MUTATIONS} mutations, 0 faults" in totals
    [codes] = re.findall(r"exit codes of the last command: (.*)", totals)
    failed = sum(int(n) for code, n in re.findall(r"(\d+): (\d+)", codes) if code != "0")
    assert failed > MUTATIONS // 4  # the mutations do break things


@pytest.mark.campaign
def test_the_campaign(request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--mutations", default=0)
    if not count:
        pytest.skip("pytest tests/fuzz -m campaign --mutations 3000 runs it")
    print(run("--seed", request.config.getoption("--mutation-seed"), "--mutations", count))
