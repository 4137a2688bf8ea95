"""The roofline: limits it must have, and sums checked by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trtllm_options import model_config
from trtllm_redrafter.planning.gpus import gpu
from trtllm_redrafter.planning.latency import (
    KERNELS_PER_LAYER,
    Assumptions,
    LatencyEstimate,
    LatencyRow,
    batch_sizes,
    estimate_latency,
)
from trtllm_redrafter.planning.memory import base_parameters, kv_bytes_per_token, weight_bytes
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape

IDEAL = Assumptions(context_len=1000, bandwidth_efficiency=1.0, compute_efficiency=1.0, kernel_us=0.0)


def plan(batch: int = 1, accepted: float | None = None, a: Assumptions = IDEAL, **changes: object) -> LatencyEstimate:
    config = model_config(**changes)
    return estimate_latency(config, gpu("h100-80gb"), a, max_batch_size=batch, acceptance_length=accepted)


def test_one_request_moves_all_weights_once() -> None:
    config = model_config()
    arithmetic = 2 * base_parameters(config) / 989.5e12
    seconds = math.hypot(weight_bytes(config).base / 3.35e12, arithmetic) + 1000 * kv_bytes_per_token(config) / 3.35e12
    row = plan().rows[0]
    assert row.plain_ms == pytest.approx(1e3 * seconds)
    assert row.verify_ms == pytest.approx(row.plain_ms, rel=2e-3)  # 13 rows cost what one does
    assert row.draft_ms > 4 * 1e3 * weight_bytes(config).drafter / 3.35e12  # four rounds, one after the other


def test_large_batches_are_limited_by_arithmetic() -> None:
    first, last = plan(batch=512).rows[0], plan(batch=512).rows[-1]
    cache = 512 * 1000 * kv_bytes_per_token(model_config()) / 3.35e12
    arithmetic = 2 * 512 * 13 * base_parameters(model_config()) / 989.5e12
    assert last.batch == 512 and last.verify_ms >= 1e3 * (arithmetic + cache)
    assert first.verify_ms == pytest.approx(first.plain_ms, rel=2e-3) and last.verify_ms > 2 * last.plain_ms


def test_break_even_and_speed_up_are_two_sides_of_one_thing() -> None:
    row = plan(batch=4, accepted=2.5).rows[-1]
    assert row.speedup(row.break_even) == pytest.approx(1.0) and row.speedup(2.5) == pytest.approx(2.5 / row.break_even)
    assert plan(accepted=2.5).as_dict()["rows"][0]["speedup"] == pytest.approx(plan().rows[0].speedup(2.5))
    assert "speed-up at 2.50" in plan(accepted=2.5).render() and "break-even" in plan().render()


def test_a_plain_model_breaks_even_at_one() -> None:
    assert all(row.break_even == 1.0 and row.draft_ms == 0.0 for row in plan(batch=8, drafter=False).rows)


def test_a_smaller_drafter_and_a_shorter_draft_cost_less() -> None:
    small = DrafterConfig(vocab_size=32000, hidden_size=1024, exit_dim=256, num_layers=1)
    assert plan(drafter=True).rows[0].draft_ms > estimate_latency(
        replace(model_config(), drafter=small), gpu("h100-80gb"), IDEAL, max_batch_size=1, acceptance_length=None
    ).rows[0].draft_ms  # fmt: skip
    assert plan(draft_shape=DraftShape(3, 2)).rows[0].draft_ms < 0.6 * plan().rows[0].draft_ms


def test_assumptions_matter_as_they_say() -> None:
    slow = plan(a=replace(IDEAL, bandwidth_efficiency=0.5)).rows[0]
    assert slow.plain_ms == pytest.approx(2 * plan().rows[0].plain_ms, rel=1e-4)
    fixed = plan(a=replace(IDEAL, kernel_us=5.0)).rows[0].plain_ms - plan().rows[0].plain_ms
    assert fixed == pytest.approx(1e-3 * 5.0 * KERNELS_PER_LAYER * 4)


def test_ranks_divide_the_work_and_talk() -> None:
    one, four = plan().rows[0], plan(tp_size=4).rows[0]
    assert four.plain_ms > one.plain_ms / 4
    assert four.plain_ms - 1e3 * 2 * 4 * 10e-6 < one.plain_ms


def test_batch_sizes_end_at_the_limit() -> None:
    assert batch_sizes(1) == (1,) and batch_sizes(8) == (1, 2, 4, 8) and batch_sizes(12) == (1, 2, 4, 8, 12)


def test_the_plan_is_near_what_an_h200_did() -> None:
    """Measured with the torch backend's graphs. `gpu_steps.py --again` writes the plan's side of the file anew."""
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_steps.json"
    models = json.loads(file.read_text())["models"]
    for name, model in models.items():
        for row in model.get("products", []):
            assert row["planned_ms"] == pytest.approx(row["ms"], rel=0.10), (name, row)
        for row in model["rows"]:
            assert row["planned"]["plain_ms"] == pytest.approx(row["plain_ms"], rel=0.10), (name, row)
            assert row["planned"]["draft_ms"] == pytest.approx(row["draft_ms"], rel=0.17), (name, row)
        assert model["rows"][0]["planned"]["break_even"] == pytest.approx(model["rows"][0]["break_even"], rel=0.07)


def test_the_file_holds_the_plan_of_today() -> None:
    from benchmarks.gpu_steps import add_plan

    file = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_steps.json"
    kept, fresh = json.loads(file.read_text()), json.loads(file.read_text())
    add_plan(fresh)
    assert fresh == kept, "run benchmarks/gpu_steps.py --again"


def test_slimmer_drafters_cost_less_and_no_wider_one_is_offered() -> None:
    wide = plan()  # hidden size 1024, exit_dim 2048
    assert [slim.exit_dim for slim in wide.slimmer] == [1024, 512, 256]
    costs = [wide.rows[0].draft_ms, *(slim.row.draft_ms for slim in wide.slimmer)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4
    # What is said of a width is what planning a drafter of that width says.
    config = model_config()
    assert config.drafter is not None
    config = replace(config, drafter=replace(config.drafter, exit_dim=512))
    half = estimate_latency(config, gpu("h100-80gb"), IDEAL, max_batch_size=1, acceptance_length=None)
    assert half.rows[0].draft_ms == pytest.approx(wide.slimmer[1].row.draft_ms)
    assert [slim.exit_dim for slim in half.slimmer] == [256]
    assert wide.as_dict()["slimmer"][1]["break_even"] == pytest.approx(half.rows[0].break_even)


def test_the_plan_says_what_a_slimmer_drafter_may_lose() -> None:
    wide = plan(accepted=3.0)
    equal = 3.0 * wide.slimmer[0].row.break_even / wide.rows[0].break_even
    assert f"as fast as now at {equal:.2f} tokens per step" in wide.render()
    assert wide.rows[0].speedup(3.0) == pytest.approx(wide.slimmer[0].row.speedup(equal))


def test_without_a_drafter_there_is_nothing_slimmer() -> None:
    config = model_config(drafter=False)
    assert estimate_latency(config, gpu("h100-80gb"), IDEAL, max_batch_size=1, acceptance_length=None).slimmer == ()


def test_a_search_is_dear_above_a_quarter_of_a_plain_step() -> None:
    assert not LatencyRow(1, 4.0, 4.0, 1.0).dear and LatencyRow(1, 4.0, 4.0, 1.01).dear
