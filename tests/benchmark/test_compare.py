"""A planted regression is found; noise is not one."""

from __future__ import annotations

import pytest

from tests.benchmark.made import batch_records, result
from trtllm_redrafter.benchmark.compare import REGRESSION, SPEEDUP, TOO_LITTLE, compare
from trtllm_redrafter.benchmark.records import BenchResult
from trtllm_redrafter.benchmark.statistics import Bootstrap
from trtllm_redrafter.errors import MismatchError, UsageError

BOOTSTRAP = Bootstrap(500, 0.95, 0)


def made(faster: float, seed: int, machine: float = 1.0) -> BenchResult:
    return result(batch_records(faster, noise=0.03, seed=seed, machine=machine))


def test_a_planted_regression_is_flagged() -> None:
    found = compare([("old", made(1.5, 1)), ("new", made(1.35, 2))], BOOTSTRAP, tolerance=0.02)
    by_figure = {c.figure: c for c in found.changes}
    assert found.exit_code == 8 and by_figure[SPEEDUP].verdict == REGRESSION
    assert by_figure["drafting, tokens/s"].verdict == REGRESSION
    assert by_figure["autoregression, tokens/s"].verdict != REGRESSION
    assert by_figure[SPEEDUP].ratio.value == pytest.approx(0.9, abs=0.03) and "REGRESSION" in found.render()


def test_noise_is_not_flagged() -> None:
    flagged = [compare([("old", made(1.5, s)), ("new", made(1.5, 100 + s))], BOOTSTRAP, tolerance=0.02).exit_code
               for s in range(20)]  # fmt: skip
    assert sum(code != 0 for code in flagged) <= 1


def test_a_slower_machine_changes_speeds_and_not_the_speedup() -> None:
    found = compare([("old", made(1.5, 1)), ("new", made(1.5, 2, machine=0.7))], BOOTSTRAP, tolerance=0.02)
    verdicts = {c.figure: c.verdict for c in found.changes}
    assert verdicts["drafting, tokens/s"] == REGRESSION and verdicts[SPEEDUP] != REGRESSION


def test_improvements_tolerance_and_several_results() -> None:
    found = compare([("a", made(1.2, 1)), ("b", made(1.5, 2)), ("c", made(1.1, 3))], BOOTSTRAP, tolerance=0.2)
    verdicts = {(c.name, c.figure): c.verdict for c in found.changes}
    assert verdicts["b", SPEEDUP] == "faster" and verdicts["c", SPEEDUP] == "slower" and found.exit_code == 0


def test_what_cannot_be_compared() -> None:
    other = result(batch_records(1.5, batch=8))
    with pytest.raises(MismatchError, match="shares no batch size"):
        compare([("a", made(1.5, 1)), ("b", other)], BOOTSTRAP, tolerance=0.02)
    with pytest.raises(UsageError, match="two results"):
        compare([("a", made(1.5, 1))], BOOTSTRAP, tolerance=0.02)


def test_notes_name_what_else_differs() -> None:
    new = made(1.5, 2)
    new = BenchResult(new.engine, {**new.settings, "max_tokens": 7}, new.environment, new.batches, complete=False)
    text = compare([("a", made(1.5, 1)), ("b", new)], BOOTSTRAP, tolerance=0.02).render()
    assert "max_tokens differs" in text and "b was interrupted" in text


def test_an_interrupted_result_is_not_slower_for_the_prompts_it_reached() -> None:
    """The second repeat ended after the slowest prompts: counted, they would weigh twice and look like a regression."""
    new = batch_records(1.5, repeats=2)
    for side in (new.drafting, new.autoregression):
        side.records = [r for r in side.records if r.repeat == 0 or int(r.item[1:]) % 5 == 4]
    found = compare([("old", result(batch_records(1.5))), ("new", result(new))], BOOTSTRAP, tolerance=0.02)
    assert [c.ratio.value for c in found.changes] == pytest.approx([1.0, 1.0, 1.0]) and found.exit_code == 0


def test_a_few_measurements_are_no_regression() -> None:
    old, new = (result(batch_records(f, prompts=1, repeats=3)) for f in (1.5, 1.0))
    found = compare([("old", old), ("new", new)], BOOTSTRAP, tolerance=0.02)
    assert {c.verdict for c in found.changes} == {TOO_LITTLE} and found.exit_code == 0
