"""Measured on tiny engines: real counts, equal outputs, what an interruption leaves, slow drafters, planted faults."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.engines import make_runner
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.backends.torch.search import PlainSearch
from trtllm_redrafter.backends.torch.transformer import TorchExecutor
from trtllm_redrafter.benchmark.figures import NO_GO, batch_figures, judge
from trtllm_redrafter.benchmark.measure import MeasureOptions, Session, _rounds, _warm_up, examine, run_round
from trtllm_redrafter.benchmark.prompts import Item
from trtllm_redrafter.benchmark.statistics import Bootstrap
from trtllm_redrafter.errors import NumericalError, UsageError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.token_tree import Tree

OPTIONS = MeasureOptions(batches=(1, 3), max_tokens=8, repeats=3, warmup=1)
ITEMS = [Item(f"p{i}", "even" if i % 2 == 0 else "odd", (5 + i, 6, 7 + i)) for i in range(6)]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    return make_runner(tmp_path_factory.mktemp("engine"))


def test_both_sides_are_measured_on_the_same(runner: TorchRunner) -> None:
    session = Session(runner, runner, ITEMS, OPTIONS)
    session.run(no_progress)
    assert [b.batch for b in session.batches] == [1, 3]
    for batch in session.batches:
        assert not batch.differences
        keys = [{(r.item, r.repeat): r for r in side.records} for side in (batch.drafting, batch.autoregression)]
        assert keys[0].keys() == keys[1].keys() and len(keys[0]) == len(ITEMS) * OPTIONS.repeats
        for key, mine in keys[0].items():
            plain = keys[1][key]
            assert (mine.output, mine.tokens) == (plain.output, plain.tokens)
            assert mine.tokens == 1 + mine.steps + mine.accepted_tokens and plain.steps == plain.tokens - 1
            assert mine.drafted_tokens > 0 and plain.drafted_tokens == 0
            assert 0 < mine.first_token_seconds <= mine.seconds
            assert mine.step_seconds <= mine.decode_seconds < mine.seconds
        plain_side = batch.autoregression
        # the first token comes with the first step's, every other one alone
        assert [r.gaps for r in plain_side.records] == [max(0, r.tokens - 2) for r in plain_side.records]
        assert all(len(side.gaps) == sum(r.gaps or 0 for r in side.records) for side in (batch.drafting, plain_side))
        assert min(plain_side.gaps) > 0
        assert sum(r.seconds for r in plain_side.records) <= batch.batch * plain_side.wall_seconds
    assert not runner.has_work


def test_places_are_refilled_and_never_exceeded(runner: TorchRunner) -> None:
    most = []
    step = runner.step

    def watched() -> list[object]:
        updates = step()
        most.append(len(runner._active) + sum(u.result is not None for u in updates))
        return updates  # type: ignore[return-value]

    runner.step = watched  # type: ignore[method-assign,assignment]
    try:
        found = run_round(runner, ITEMS, batch=2, max_tokens=8, draft=False, repeat=0)
    finally:
        del runner.step  # type: ignore[method-assign]
    assert len(found.records) == len(ITEMS) and max(most) == 2


def test_interruption_keeps_finished_rounds_and_an_idle_runner(runner: TorchRunner) -> None:
    session = Session(runner, runner, ITEMS, MeasureOptions((1,), 8, 3, 1))

    def stop_at_four(stage: str, done: int, total: int | None, unit: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.run(stop_at_four)
    assert len(session.batches[0].drafting.records) == len(session.batches[0].autoregression.records) == 4
    assert not runner.has_work and len(runner._free) == runner.info.max_batch_size


@pytest.mark.parametrize(
    ("prompts", "batch", "sizes"), [(3, 1, [1, 1, 1]), (80, 4, [16] * 5), (80, 16, [80]), (17, 2, [8, 9]), (5, 4, [5])]
)
def test_rounds_are_equal_parts(prompts: int, batch: int, sizes: list[int]) -> None:
    items = [Item(f"p{i}", "", (1,)) for i in range(prompts)]
    rounds = _rounds(items, batch)
    assert [len(r) for r in rounds] == sizes and [i for r in rounds for i in r] == items


@pytest.mark.parametrize(("count", "lengths"), [(1, [9]), (2, [9, 2]), (3, [9, 7, 2]), (6, [9, 9, 7, 7, 5, 2])])
def test_warm_up_goes_from_the_longest_to_the_shortest(count: int, lengths: list[int]) -> None:
    rounds = [[Item("a", "", (1,) * 2)], [Item("b", "", (1,) * 9)], [Item("c", "", (1,) * 5)],
              [Item("d", "", (1,) * 7), Item("e", "", (1,))]]  # fmt: skip
    assert [max(len(i.token_ids) for i in items) for items in _warm_up(rounds, count)] == lengths


def test_a_batch_that_cannot_fill_is_refused(runner: TorchRunner) -> None:
    with pytest.raises(UsageError, match="6 prompts cannot fill a batch of 9"):
        Session(runner, runner, ITEMS, MeasureOptions((1, 9), 8, 3, 1))


def test_batch_sizes_are_checked(runner: TorchRunner) -> None:
    with pytest.raises(UsageError) as caught:
        MeasureOptions((0, 9, 9), 8, 3, 1).check(runner, Path("engine"))
    text = caught.value.render()
    assert "batch 0" in text and "batch 9" in text and "given twice" in text


class SlowDrafting:
    """A drafter that takes its time and is never right."""

    error = None

    def __init__(self, shape: object) -> None:
        self.shape = shape

    def propose(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> list[Tree]:
        time.sleep(0.01)
        return [Tree.merge([[root, 63, 63, 63]]) for root in roots]


def test_an_engineered_slow_drafter_is_a_no_go(tmp_path: Path) -> None:
    slow = make_runner(tmp_path, draft_len=3)
    assert slow._drafting is not None
    slow._drafting = SlowDrafting(slow._drafting.shape)  # type: ignore[assignment]
    session = Session(slow, slow, ITEMS, MeasureOptions((1,), 8, 3, 1))
    session.run(no_progress)
    figures = batch_figures(session.batches[0], Bootstrap(500, 0.95, 0))
    verdict = judge(figures, session.batches[0].differences)
    assert verdict.answer == NO_GO and figures.step_time_ratio > 1.5, verdict.render()


def test_a_wrong_token_is_a_fault_and_a_tie_is_not(runner: TorchRunner) -> None:
    item = ITEMS[0]
    text = run_round(runner, [item], batch=1, max_tokens=8, draft=False, repeat=0).results[item.item_id].token_ids
    wrong = [*text[:3], (text[3] + 1) % 64, *text[4:]]
    found = examine(runner, item, wrong, text, batch=1, alike=True)
    assert (found.kind, found.position) == ("fault", 3) and found.gap is not None and found.gap > (found.bound or 0)
    assert examine(runner, item, text[:-1], text, batch=1, alike=True).kind == "fault"
    # the same two texts, compared where rounding is as wide as the gap
    runner.info = type(runner.info)(**{**vars(runner.info), "dtype": "wide"})
    try:
        from trtllm_redrafter.verify import token_checks as ties

        ties.ROUNDING["wide"] = 10.0
        assert examine(runner, item, wrong, text, batch=1, alike=True).kind == "tie"
    finally:
        del ties.ROUNDING["wide"]
        runner.info = type(runner.info)(**{**vars(runner.info), "dtype": "float32"})


def test_a_planted_difference_is_found_once(tmp_path: Path) -> None:
    one, two = make_runner(tmp_path / "a"), make_runner(tmp_path / "b", num_hidden_layers=1)
    session = Session(one, two, ITEMS[:2], MeasureOptions((1,), 8, 3, 1))
    session.run(no_progress)
    assert {d.item for d in session.batches[0].differences} == {"p0", "p1"}
    assert len(session.batches[0].differences) == 2  # once per prompt, not per repeat


def test_numbers_that_are_not_finite_end_a_benchmark(tmp_path: Path) -> None:
    """Of the base model, and of the drafter: its undrafted steps would be measured as drafting."""
    base = make_runner(tmp_path / "base")
    assert isinstance(base.executor, TorchExecutor)
    base.executor._weights.final_norm[0] = float("nan")
    with pytest.raises(NumericalError, match="the logits after the prompt"):
        Session(base, base, ITEMS, OPTIONS).run(no_progress)
    drafter = make_runner(tmp_path / "drafter")
    assert isinstance(drafter._drafting, PlainSearch) and drafter._drafting._drafter.rnn_u is not None
    drafter._drafting._drafter.rnn_u.bias[0] = float("nan")
    with pytest.raises(NumericalError, match="the drafter's scores"):
        Session(drafter, drafter, ITEMS, OPTIONS).run(no_progress)


@pytest.mark.parametrize(("prepares", "rounds"), [(False, 2), (True, 6)])
def test_a_runner_that_prepares_shapes_meets_all_of_them_before(
    runner: TorchRunner, monkeypatch: pytest.MonkeyPatch, prepares: bool, rounds: int
) -> None:
    """A kernel compiled in a measured round would count as its time."""
    monkeypatch.setattr(runner, "prepares_shapes", prepares)
    seen: list[tuple[str, ...]] = []
    real = Session._pair

    def noted(session: Session, batch: int, items: Sequence[Item], *turn: int) -> Any:
        seen.append(tuple(item.item_id for item in items))
        return real(session, batch, items, *turn)

    monkeypatch.setattr(Session, "_pair", noted)
    Session(runner, runner, ITEMS, MeasureOptions(batches=(1,), max_tokens=2, repeats=3, warmup=2)).run(no_progress)
    assert len(seen) == rounds + 3 * len(ITEMS) and len(set(seen[:rounds])) == rounds
