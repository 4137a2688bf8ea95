"""The time of a decoding step for every shape of a grid: measured on this machine, or from a GPU's roofline.

A step's time does not depend on how many of its drafts are accepted, so timing a few steps is enough. Drafting and
plain steps alternate in short runs, so that a change of the machine's speed affects both; the median of the runs'
ratios is robust against a burst of other work during one of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from trtllm_redrafter.backends.base import Request, Runner, SamplingParams, Update
from trtllm_redrafter.benchmark.measure import both_sides
from trtllm_redrafter.benchmark.prediction import StepCost, shape_name
from trtllm_redrafter.benchmark.prompts import Item
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.planning.gpus import Gpu
from trtllm_redrafter.planning.latency import Assumptions, estimate_latency
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.redrafter.config import DraftShape

RUNS = 8
"""Pairs of a drafting and a plain run per setting, over which the steps are spread."""


_MEDIAN_ERROR = 1.25
"""Standard error of a median relative to that of a mean, for normal noise: sqrt(pi / 2)."""


@dataclass(frozen=True)
class Timing:
    """How steps are timed: `steps` of each kind per shape and batch size."""

    batches: tuple[int, ...]
    steps: int


def measured_costs(
    load: Callable[[DraftShape], Runner],
    grid: Sequence[DraftShape],
    items: Sequence[Item],
    timing: Timing,
    progress: Progress,
) -> list[StepCost]:
    """Load the engine with each shape in turn and time its steps."""
    found: list[StepCost] = []
    for shape in grid:
        with both_sides(load(shape)) as (runner, plain_runner):
            for batch in timing.batches:
                found.append(time_steps(runner, plain_runner, shape, items, batch, timing.steps))
                progress("time steps", len(found), len(grid) * len(timing.batches), "settings")
    return _with_common_plain(found)


def time_steps(
    runner: Runner, plain_runner: Runner, shape: DraftShape, items: Sequence[Item], batch: int, steps: int
) -> StepCost:
    """The plain step's mean time, and the drafting step's as a multiple of it."""
    each = -(-steps // RUNS)
    plain: list[float] = []
    ratios: list[float] = []
    for number in range(RUNS):
        # Texts from the whole list: the context's length affects a step's time, its acceptance does not.
        chosen = [items[(number + i * max(1, len(items) // batch)) % len(items)] for i in range(batch)]
        order = (True, False) if number % 2 == 0 else (False, True)
        sides = {True: runner, False: plain_runner}
        times = {draft: _run(sides[draft], chosen, each, shape.draft_len + 1, draft=draft) for draft in order}
        if times[True] and times[False]:
            plain += times[False]
            ratios.append(statistics.fmean(times[True]) / statistics.fmean(times[False]))
    if len(ratios) < 2:
        raise UsageError(
            f"there is no room to time {shape_name(shape)} at batch {batch}",
            where=runner.info.path,
            remedy="build with a larger --max-seq-len, or use shorter prompts",
        )
    seconds, ratio = trimmed_mean(plain), statistics.median(ratios)
    error = _MEDIAN_ERROR * statistics.stdev(ratios) / math.sqrt(len(ratios)) / ratio
    return StepCost(shape, batch, ratio * seconds, seconds, error)


def trimmed_mean(values: Sequence[float]) -> float:
    """Mean without the slowest and the fastest tenth, which are affected by other work on the machine."""
    cut = len(values) // 10
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def _run(runner: Runner, items: Sequence[Item], steps: int, most_per_step: int, *, draft: bool) -> list[float]:
    """Seconds of each of `steps` steps with all `items` decoding; the step that admits them is not counted."""
    available = runner.info.max_seq_len - max(len(i.token_ids) for i in items)
    tokens = min(available, (steps + 2) * most_per_step + 2)
    sampling = SamplingParams(tokens, ignore_eos=True)
    ids = [runner.submit(Request(item.token_ids, sampling, draft=draft)) for item in items]
    seconds: list[float] = []
    try:
        full = not _any_finished(runner.step())
        while full and len(seconds) < steps:
            start = time.perf_counter()
            updates = runner.step()
            elapsed = time.perf_counter() - start
            full = not _any_finished(updates)  # a request that finishes leaves a smaller batch
            if full:
                seconds.append(elapsed)
    finally:
        for request_id in ids:
            runner.cancel(request_id)
    return seconds


def _any_finished(updates: Sequence[Update]) -> bool:
    return any(u.result is not None for u in updates)


def _with_common_plain(costs: Sequence[StepCost]) -> list[StepCost]:
    """One plain step time per batch size; each shape keeps its own ratio, whose runs were interleaved."""
    plain = {batch: statistics.median(c.plain for c in costs if c.batch == batch) for batch in {c.batch for c in costs}}
    return [replace(c, drafting=c.ratio * plain[c.batch], plain=plain[c.batch]) for c in costs]


def roofline_costs(
    config: CheckpointConfig, gpu: Gpu, assumptions: Assumptions, grid: Sequence[DraftShape], batches: Sequence[int]
) -> list[StepCost]:
    """The latency plan's step times for every shape; nothing is measured."""
    found = []
    for shape in grid:
        changed = replace(config, draft_shape=shape)
        for batch in batches:
            plan = estimate_latency(changed, gpu, assumptions, max_batch_size=batch, acceptance_length=None)
            row = plan.rows[-1]
            assert row.batch == batch, shape_name(shape)
            found.append(StepCost(shape, batch, 1e-3 * row.redrafter_ms, 1e-3 * row.plain_ms, 0.0))
    return found
