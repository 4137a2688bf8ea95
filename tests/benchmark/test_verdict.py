"""Go, no-go, not significant: at the border and beyond."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.benchmark.made import batch_records
from trtllm_redrafter.benchmark.figures import GO, NO_GO, NOT_SIGNIFICANT, BatchFigures, batch_figures, judge
from trtllm_redrafter.benchmark.records import BatchRecords, Difference
from trtllm_redrafter.benchmark.statistics import Bootstrap, Estimate

BOOTSTRAP = Bootstrap(300, 0.95, 0)
FIGURES = batch_figures(batch_records(1.5), BOOTSTRAP)


def with_interval(low: float, high: float) -> BatchFigures:
    return replace(FIGURES, speedup=Estimate((low + high) / 2, low, high))


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (1.001, 1.2, GO),
        (1.0, 1.2, NOT_SIGNIFICANT),
        (0.9, 1.1, NOT_SIGNIFICANT),
        (0.9, 1.0, NOT_SIGNIFICANT),
        (0.9, 0.999, NO_GO),
    ],
)
def test_the_interval_decides(low: float, high: float, answer: str) -> None:
    assert judge(with_interval(low, high), []).answer == answer


def test_the_numbers_are_in_the_reason() -> None:
    text = judge(with_interval(1.1, 1.3), []).render()
    assert "batch 1: go" in text and "1.20 (1.10 to 1.30)" in text
    assert "1.98 tokens" in text and "1.98 plain steps" in text  # 1 + 49/50 drafts; steps of 1/50 s against 1/99 s


def test_a_fault_is_a_no_go_at_any_speed() -> None:
    fault = Difference("p1", 1, 7, "fault", 3.0, 0.1)
    verdict = judge(with_interval(2.0, 3.0), [fault])
    assert verdict.answer == NO_GO and "1 output(s) differ" in verdict.reason


def test_ties_and_unexamined_differences_are_said() -> None:
    others = [Difference("p1", 1, 7, "tie", 0.01, 0.1), Difference("p2", 1, 3, "unexamined", None, None)]
    verdict = judge(with_interval(2.0, 3.0), others)
    assert verdict.answer == GO and "tie" in verdict.reason and "does not show why" in verdict.reason


def test_nothing_measured_decides_nothing() -> None:
    assert judge(batch_figures(BatchRecords(1), BOOTSTRAP), []).answer == NOT_SIGNIFICANT


@pytest.mark.parametrize(("repeats", "answer"), [(4, NOT_SIGNIFICANT), (5, GO)])
def test_a_handful_of_measurements_decides_nothing(repeats: int, answer: str) -> None:
    """One prompt, always as fast: the spread of so few is no measure of what the next one would be."""
    figures = batch_figures(batch_records(1.5, prompts=1, repeats=repeats), BOOTSTRAP)
    assert figures.speedup.low > 1.0 and judge(figures, []).answer == answer
