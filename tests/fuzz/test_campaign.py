"""Broken inputs end in a message: no traceback, crash, hang or half-written output, whatever the command."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.fuzz.campaign import campaign, run_chain, split, warm_up
from tests.fuzz.inputs import make_inputs
from tests.fuzz.targets import TARGETS

MUTATIONS = 120
"""About a minute on one core; another set than the long campaign's, and the same one every time."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    warm_up()
    return make_inputs(tmp_path_factory.mktemp("fuzz") / "inputs")


NEED_A_GPU = {"run --engine trt --prompt hi": 6, "bench trt --batch 1": 2}


def test_every_command_works_on_what_is_not_broken(inputs: Path, tmp_path: Path) -> None:
    """Else a campaign would break inputs that nothing reads, behind a refusal that is always the same."""
    chains = dict.fromkeys(chain for target in TARGETS for chain in target.chains)
    for number, lines in enumerate(chains):
        folder = tmp_path / str(number)
        shutil.copytree(inputs, folder, copy_function=os.link)
        case = run_chain(split(lines), folder, number, "nothing")
        assert case.fault is None and case.codes[-1] == NEED_A_GPU.get(lines[-1], 0), case.render()


def test_a_minute_of_mutations(inputs: Path) -> None:
    totals = campaign(inputs, 0, range(MUTATIONS))
    assert not totals.faults, "\n\n".join(case.render() for case in totals.faults)
    assert totals.cases == MUTATIONS
    assert sum(n for code, n in totals.codes.items() if code != 0) > MUTATIONS // 4  # the mutations do break things


@pytest.mark.campaign
def test_the_campaign(inputs: Path, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--mutations", default=0)
    if not count:
        pytest.skip("pytest tests/fuzz -m campaign --mutations 3000 runs it")
    totals = campaign(inputs, request.config.getoption("--mutation-seed"), range(count))
    print(totals.render())
    assert not totals.faults, "\n\n".join(case.render() for case in totals.faults)
