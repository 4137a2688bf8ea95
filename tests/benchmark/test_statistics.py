"""Figures against cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.benchmark.made import batch_records, record
from trtllm_redrafter.benchmark.figures import batch_figures, side_figures
from trtllm_redrafter.benchmark.records import BatchRecords, SideRecords
from trtllm_redrafter.benchmark.statistics import Bootstrap, Estimate, Table, percentiles, speed_ratio, speedup

BOOTSTRAP = Bootstrap(draws=2000, level=0.95, seed=0)


def test_percentiles_interpolate() -> None:
    assert percentiles([1, 2, 3, 4, 5], (50, 95)) == {"p50": 3.0, "p95": pytest.approx(4.8)}
    assert percentiles([], (50,)) == {"p50": None}


def test_speedup_is_the_ratio_of_summed_speeds() -> None:
    # drafting: 100 tokens in 1 s and 300 in 4 s = 80/s; autoregression: 2 s and 8 s = 40/s
    batch = BatchRecords(1)
    batch.drafting.records = [record("a", 0, 1.0), record("b", 0, 4.0, tokens=300)]
    batch.autoregression.records = [record("a", 0, 2.0), record("b", 0, 8.0, tokens=300)]
    found = speedup(Table.of(batch), "seconds", BOOTSTRAP)
    assert found == Estimate(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))


def test_interval_is_that_of_all_draws() -> None:
    """Two prompts, one twice as fast, one not: draws give 2, 1 or the middle, by hand 200/(50+100) and 1.333."""
    batch = BatchRecords(1)
    batch.drafting.records = [record("a", 0, 1.0), record("b", 0, 2.0)]
    batch.autoregression.records = [record("a", 0, 2.0), record("b", 0, 2.0)]
    found = speedup(Table.of(batch), "seconds", BOOTSTRAP)
    assert (found.value, found.low, found.high) == (pytest.approx(4 / 3), pytest.approx(1.0), pytest.approx(2.0))


def test_only_pairs_count() -> None:
    batch = BatchRecords(1)
    batch.drafting.records = [record("a", 0, 1.0), record("a", 1, 100.0), record("b", 0, 1.0)]
    batch.autoregression.records = [record("a", 0, 3.0), record("c", 0, 1.0)]
    table = Table.of(batch)
    assert table.items == ("a",) and table.drafting.seconds.tolist() == [[1.0]]
    assert speedup(table, "seconds", BOOTSTRAP).value == pytest.approx(3.0)


def test_an_interrupted_repeat_weighs_what_it_measured() -> None:
    batch = batch_records(2.0, prompts=4, repeats=2)
    batch.drafting.records.pop()  # the last prompt's second repeat is missing on one side
    table = Table.of(batch)
    assert int((table.drafting.seconds == 0).sum()) == int((table.autoregression.seconds == 0).sum()) == 1
    assert speedup(table, "seconds", BOOTSTRAP).value == pytest.approx(2.0)


def test_nothing_measured_is_not_a_number() -> None:
    assert math.isnan(speedup(Table.of(BatchRecords(1)), "seconds", BOOTSTRAP).value)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Noise of prompts alone: 95 % intervals of 60 made-up results must hold the true 1.3 in most."""
    hits = 0
    for seed in range(60):
        table = Table.of(batch_records(1.3, noise=0.1, seed=seed, prompts=40))
        found = speedup(table, "seconds", Bootstrap(400, 0.95, seed))
        hits += found.low <= 1.3 <= found.high
    assert 50 <= hits <= 60


def test_weights_are_reproducible_and_sum_up() -> None:
    prompts, repeats = BOOTSTRAP.weights(5, 3)
    again, _ = BOOTSTRAP.weights(5, 3)
    assert np.array_equal(prompts, again) and (prompts.sum(axis=1) == 5).all() and (repeats.sum(axis=1) == 3).all()
    other = BOOTSTRAP.other_repeats(3)
    assert other.shape == repeats.shape and not np.array_equal(other, repeats)


def test_figures_of_one_side() -> None:
    # two requests of 101 tokens in 2 s each, one after the other, 50 steps of 30 ms, 50 drafts accepted
    records = [record(i, 0, 2.0, tokens=101, steps=50, accepted=50, step_seconds=1.5) for i in "ab"]
    found = side_figures(SideRecords(records, wall_seconds=4.0, gaps=[0.01, 0.03]))
    assert found.tokens == 202 and found.tokens_per_second == pytest.approx(50.5)
    assert found.decode_tokens_per_second == pytest.approx(200 / 3.6)  # the first tenth is the prompt's
    assert found.seconds_per_token == pytest.approx(3.6 / 200)
    assert found.step_seconds == pytest.approx(0.03) and found.acceptance_length == pytest.approx(2.0)
    assert found.acceptance_rate_per_position == pytest.approx([1.0, 0.0, 0.0])
    assert found.concurrency == pytest.approx(1.0)
    assert found.gap_seconds["p50"] == pytest.approx(0.02) and found.first_token_seconds["p50"] == pytest.approx(0.2)


def test_step_time_ratio_and_categories() -> None:
    figures = batch_figures(batch_records(1.5), BOOTSTRAP)
    assert figures.step_time_ratio == pytest.approx(99 / 50)
    assert figures.as_dict()["step_time_ratio"] == figures.step_time_ratio
    assert {name: c.prompts for name, c in figures.categories.items()} == {"translation": 10, "question answering": 10}
    assert all(c.speedup.value == pytest.approx(1.5) for c in figures.categories.values())
    assert figures.total_speedup == pytest.approx(1.5)


def test_unpaired_repeats_by_hand() -> None:
    """One prompt of 100 tokens; a took 1 s twice, b 1 s and 3 s. a over b: 200/2 over 200/4; draws of b: 1, 2, 3 s."""
    one, other = BatchRecords(1), BatchRecords(1)
    for made, seconds in ((one, (1.0, 1.0)), (other, (1.0, 3.0))):
        made.drafting.records = [record("p", repeat, s) for repeat, s in enumerate(seconds)]
        made.autoregression.records = list(made.drafting.records)
    found = speed_ratio(Table.of(one).drafting, Table.of(other).drafting, "seconds", BOOTSTRAP)
    assert (found.value, found.low, found.high) == (pytest.approx(2.0), pytest.approx(1.0), pytest.approx(3.0))


def test_no_sample_is_no_interval() -> None:
    found = BOOTSTRAP.interval(1.5, np.array([np.nan, np.inf]))
    assert found.value == 1.5 and math.isnan(found.low) and math.isnan(found.high)


def test_a_repeat_cut_short_can_be_left_out() -> None:
    batch = batch_records(2.0, prompts=4, repeats=3)
    batch.drafting.records.pop()
    table = Table.of(batch)
    assert table.pairs == 11 and table.whole_repeats().drafting.seconds.shape == (4, 2)
    only = Table.of(batch_records(2.0, prompts=4, repeats=1))
    assert only.whole_repeats() is only


def test_gaps_belong_to_their_category() -> None:
    side = SideRecords(
        [record("a", 0, 1.0, gaps=2), record("b", 0, 1.0, category="other", gaps=1), record("c", 0, 1.0, gaps=1)],
        gaps=[0.01, 0.02, 0.3, 0.04],
    )
    own = side.of_category("translation")
    assert [r.item for r in own.records] == ["a", "c"] and own.gaps == [0.01, 0.02, 0.04]
    assert side.of_category("other").gaps == [0.3]
    old = SideRecords([record("a", 0, 1.0)], gaps=[0.01])  # a result that does not say
    assert side_figures(old.of_category("translation")).gap_seconds["p50"] is None
