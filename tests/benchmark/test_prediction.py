"""Predictions against cases computed by hand; step times of drafters whose cost is known."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from torch import Tensor

from tests.benchmark.test_report import check_page
from tests.engines import build_engine, load, make_runner, write_checkpoint
from trtllm_redrafter.benchmark.prediction import (
    Prediction,
    PredictionCheck,
    StepCost,
    TextSize,
    frontier,
    predict,
    ranked,
    recommend,
)
from trtllm_redrafter.benchmark.prompts import Item
from trtllm_redrafter.benchmark.statistics import Estimate
from trtllm_redrafter.benchmark.tune_report import render_html, render_text, tuned_recipe
from trtllm_redrafter.benchmark.tuning import TuneResult
from trtllm_redrafter.benchmark.tuning_inputs import roofline_costs, time_steps, trimmed_mean
from trtllm_redrafter.checkpoint.config import read_checkpoint_config
from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.planning.gpus import gpu
from trtllm_redrafter.planning.latency import Assumptions
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.token_tree import Tree
from trtllm_redrafter.training.acceptance import Acceptance

WIDE, NARROW = DraftShape(4, 4), DraftShape(1, 2)


def acceptance(shape: DraftShape, mean: float, half: float) -> Acceptance:
    return Acceptance(shape, mean, mean - half, mean + half, mean, 100, [], {})


def prediction(
    shape: DraftShape, mean: float, ratio: float, batch: int = 1, half: float = 0.1, plain: float = 0.01
) -> Prediction:
    cost = StepCost(shape, batch, ratio * plain, plain, 0.0)
    return predict(acceptance(shape, mean, half), cost, TextSize(0.0, 101))


def test_a_request_is_its_prompt_and_its_steps() -> None:
    """Batch 2: 0.2 s of prompts, then 100 tokens. Plain 100 x 10 ms = 1 s, drafting 100 / 2 x 12 ms = 0.6 s."""
    cost = StepCost(NARROW, 2, drafting=0.012, plain=0.010, error=0.0)
    found = predict(acceptance(NARROW, 2.0, 0.5), cost, TextSize(prompt_seconds=0.1, tokens=101))
    assert found.speedup.value == pytest.approx(1.2 / 0.8)
    assert found.speedup.low == pytest.approx(1.2 / (0.2 + 100 / 1.5 * 0.012))
    assert found.speedup.high == pytest.approx(1.2 / (0.2 + 100 / 2.5 * 0.012))
    assert found.user_tokens_per_second == pytest.approx(101 / 0.8)
    assert found.total_tokens_per_second == pytest.approx(2 * 101 / 0.8)
    assert found.plain_tokens_per_second == pytest.approx(101 / 1.2)


def test_both_errors_widen_the_interval() -> None:
    """1.96 x 5 % of the step alone; with 0.3 of the acceptance, the root of the squares."""
    sure = predict(acceptance(NARROW, 2.0, 0.0), StepCost(NARROW, 1, 0.01, 0.01, 0.05), TextSize(0.0, 101))
    assert sure.speedup.low == pytest.approx(2.0 / 1.098) and sure.speedup.high == pytest.approx(2.0 * 1.098)
    both = predict(acceptance(NARROW, 2.0, 0.3), StepCost(NARROW, 1, 0.01, 0.01, 0.05), TextSize(0.0, 101))
    assert 2.0 - both.speedup.low == pytest.approx(math.hypot(0.3, 2.0 - 2.0 / 1.098))


def test_break_even_is_the_step_time_ratio() -> None:
    assert prediction(NARROW, 1.5, 1.5).speedup.value == pytest.approx(1.0)


def test_recommendation_per_batch() -> None:
    grid = [prediction(WIDE, 2.4, 1.6), prediction(NARROW, 1.6, 1.2), prediction(WIDE, 2.4, 3.0, batch=8),
            prediction(NARROW, 1.6, 1.7, batch=8)]  # fmt: skip
    found = recommend(grid)
    assert found[1].shape == WIDE and "4x4" in found[1].render()
    assert found[8].shape is None and "do not draft" in found[8].render()
    assert [p.name for p in ranked(grid, 8)] == ["1x2", "4x4"]
    assert "includes 1" in recommend([prediction(WIDE, 1.65, 1.6)])[1].render()


def test_of_equals_the_smaller_tree() -> None:
    assert recommend([prediction(WIDE, 2.0, 1.0), prediction(NARROW, 2.0, 1.0)])[1].shape == NARROW


def test_frontier_drops_what_is_worse_in_both() -> None:
    fast, slow = prediction(WIDE, 2.0, 1.0), prediction(NARROW, 1.5, 1.0)
    many = prediction(NARROW, 1.5, 1.0, batch=4, plain=0.02)
    assert frontier([slow, many, fast]) == [fast, many]


def test_errors_of_a_check() -> None:
    check = PredictionCheck(prediction(WIDE, 2.2, 1.0), Estimate(2.0, 1.9, 2.1), 200.0, 2.0)
    assert check.speedup_error == pytest.approx(0.1)
    assert check.speed_error == pytest.approx(check.prediction.user_tokens_per_second / 200 - 1)


class Slow:
    """Adds a known time to every drafting step."""

    shape = DraftShape(1, 3)
    error = None

    def propose(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> list[Tree]:
        time.sleep(0.02)
        return [Tree.root(root) for root in roots]


def test_steps_are_timed_apart(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, draft_len=3)
    runner._drafting = Slow()  # type: ignore[assignment]
    items = [Item(f"p{i}", "", (3 + i, 4)) for i in range(3)]
    cost = time_steps(runner, runner, Slow.shape, items, 2, steps=8)
    assert cost.drafting > 0.02 and cost.plain < cost.drafting
    assert not runner.has_work and len(runner._free) == runner.info.max_batch_size
    short = load(build_engine(write_checkpoint(tmp_path / "b"), tmp_path / "short", max_input_len=31, max_seq_len=32))
    full = [Item("long", "", tuple(range(3, 33)))]  # 30 of 32 positions
    with pytest.raises(UsageError, match="too small to time"):
        time_steps(short, short, Slow.shape, full, 1, steps=8)


def test_trimmed_mean() -> None:
    assert trimmed_mean([1.0] * 8 + [2.0, 1000.0]) == pytest.approx(1.125)
    assert trimmed_mean([1.0, 3.0]) == 2.0


def test_roofline_grows_with_the_tree(tmp_path: Path) -> None:
    make_runner(tmp_path)
    config = read_checkpoint_config(tmp_path / "checkpoint")
    found = roofline_costs(config, gpu("h100-80gb"), Assumptions(100, 0.8, 0.6, 2.0), [NARROW, WIDE], [1, 8])
    assert [(c.shape, c.batch) for c in found] == [(NARROW, 1), (NARROW, 8), (WIDE, 1), (WIDE, 8)]
    assert found[2].drafting > found[0].drafting > found[0].plain > 0


def result(target: str, *predictions: Prediction, checks: Sequence[PredictionCheck] = ()) -> TuneResult:
    facts = {"texts": 3, "max_tokens": 101, "written_by": "the engine", "step_cost": "means of 8 steps"}
    return TuneResult(target, predictions, tuple(checks), facts)


def test_report_and_recipe() -> None:
    best = prediction(WIDE, 2.4, 1.6)
    check = PredictionCheck(best, Estimate(1.45, 1.4, 1.5), 150.0, 2.3)
    found = result("this", best, prediction(NARROW, 1.6, 1.2), checks=[check])
    html = render_html(found)
    check_page(html)
    assert "Batch 1: 4x4" in html and "+3.4 %" in html and "+3.4 %" in render_text(found)
    values = {"base": "b", "convert": {"tp_size": 2, "num_beams": 9}}
    text = tuned_recipe(values, found)
    assert yaml.safe_load(text) == {"base": "b", "convert": {"tp_size": 2, "num_beams": 4, "draft_len": 4}}
    assert "# batch 1: 4x4" in text and values["convert"] == {"tp_size": 2, "num_beams": 9}


def test_recipe_for_another_gpu_limits_the_batch() -> None:
    found = result("h100-80gb", prediction(WIDE, 2.4, 1.6), prediction(WIDE, 2.4, 1.7, batch=4),
                   prediction(WIDE, 2.4, 3.0, batch=16))  # fmt: skip
    written = yaml.safe_load(tuned_recipe({"base": "b", "tensorrt_llm": {"workers": 2}}, found))
    assert written["build"] == {"max_batch_size": 4}
    assert written["tensorrt_llm"] == {"workers": 2, "gpu": "h100-80gb"}


def test_recipe_without_a_paying_setting_leaves_the_drafter_out() -> None:
    found = result("this", prediction(WIDE, 1.4, 1.6))
    assert yaml.safe_load(tuned_recipe({"base": "b", "drafter": "d"}, found)) == {"base": "b"}


def test_recipe_for_another_gpu_limits_the_batch_to_where_the_written_shape_pays() -> None:
    """At batch 16 drafting pays with a narrow shape only, and the recipe says the wide one."""
    found = result("h100-80gb", prediction(WIDE, 2.4, 1.6), prediction(NARROW, 1.6, 1.2),
                   prediction(WIDE, 2.4, 1.9, batch=4), prediction(NARROW, 1.6, 1.5, batch=4),
                   prediction(WIDE, 2.4, 2.6, batch=16), prediction(NARROW, 1.6, 1.5, batch=16))  # fmt: skip
    values = {"base": "b", "build": {"max_batch_size": 64}, "run": {"num_beams": 9, "draft_len": 2, "device": "cpu"}}
    written = yaml.safe_load(tuned_recipe(values, found))
    assert written["convert"] == {"num_beams": 4, "draft_len": 4} and written["build"] == {"max_batch_size": 4}
    assert written["run"] == {"device": "cpu"}  # its own shape would hide the chosen one
