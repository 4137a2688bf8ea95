"""What `tune` predicts from: acceptance along texts that the base model writes once, and the time of a step.

The texts come from the recipe's engine if that is of the torch backend, whose hidden states are those it drafts from;
otherwise from transformers.

    texts = engine_texts(runner, items, max_tokens=128)
    grid_acceptance(base, drafter, texts, shapes, ...)        # one Acceptance per shape

A step's time does not depend on how many of its drafts are accepted, so timing a few steps is enough, or computing them
from a GPU's roofline. Drafting and plain steps alternate in short runs, so that a change of the machine's speed affects
both; the median of the runs' ratios is robust against a burst of other work during one of them.

    measured_costs(load, shapes, items, Timing(batches, steps), ...)      # one StepCost per shape and batch size
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.backends.base import Request, Runner, SamplingParams, Update
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.benchmark.measure import both_sides
from trtllm_redrafter.benchmark.prediction import StepCost
from trtllm_redrafter.benchmark.prompts import BenchPrompt, Item
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.planning.gpus import Gpu
from trtllm_redrafter.planning.latency import Assumptions, estimate_latency
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.prompts.chat_template import ChatTemplate, encode_prompt
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.training.acceptance import Acceptance, borrowed_head, evaluate_grid
from trtllm_redrafter.training.answers import TransformersWriter, WritingOptions, in_batches
from trtllm_redrafter.training.cache import rows_in_memory
from trtllm_redrafter.training.data import TokenizedText
from trtllm_redrafter.training.drafter_files import read_drafter
from trtllm_redrafter.training.evaluation import draft_vocab
from trtllm_redrafter.training.frozen_base import FrozenBase, load_tokenizer
from trtllm_redrafter.training.rows import TrainingRows
from trtllm_redrafter.training.trainer import BaseTensors

ROWS_AT_ONCE = 256
"""Positions to draft from at once; bounds the size of the [rows, beams, vocabulary] array."""


TOKENS_AT_ONCE = 8192
"""Tokens that the base model reads together."""


@dataclass(frozen=True)
class Texts:
    """Texts of the base model: rows to draft from, and the sizes of an average request."""

    rows: TrainingRows
    categories: tuple[str, ...]
    mean_tokens: float
    prompt_seconds: float | None
    """Mean time of a prompt's pass; None if no engine was timed."""
    written_by: str


def engine_texts(runner: TorchRunner, items: Sequence[Item], *, max_tokens: int, progress: Progress) -> Texts:
    """Texts of an engine, which must be idle, with hidden states and prompt times."""
    parts: list[tuple[Tensor, Tensor]] = []
    prompt_seconds = tokens = 0.0
    runner.generate([Request(items[0].token_ids, SamplingParams(2))])  # the first prompt may compile kernels
    for number, item in enumerate(items, start=1):
        [result] = runner.generate([Request(item.token_ids, SamplingParams(max_tokens))])
        prompt_seconds += result.prefill_seconds
        tokens += len(result.token_ids)
        start, ids = len(item.token_ids), (*item.token_ids, *result.token_ids)
        with torch.no_grad():
            states = runner.executor.hidden_states(0, ids)
        parts.append((states[start - 1 : -1].cpu(), torch.tensor(result.token_ids)))
        progress("record texts", number, len(items), "texts")
    count = len(items)
    return Texts(
        TrainingRows.join(parts), tuple(i.category for i in items), tokens / count, prompt_seconds / count, "the engine"
    )


def transformers_texts(
    base: FrozenBase,
    prompts: Sequence[BenchPrompt],
    *,
    max_tokens: int,
    batch: int,
    progress: Progress,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Texts:
    """The same without an engine. Of several turns, only the first is answered."""
    tokenizer = load_tokenizer(base.path)
    template = ChatTemplate.of(tokenizer)
    asked = [p.prompt.with_template_kwargs(template_kwargs) for p in prompts]
    ids = [encode_prompt(tokenizer, template, p.for_model(has_template=template is not None)) for p in asked]
    answers: list[list[int]] = []
    for written in in_batches(ids, TransformersWriter(base), WritingOptions(max_tokens, 0.0, 0, batch)):
        answers += written
        progress("record texts", len(answers), len(ids), "texts")
    texts = [TokenizedText.answer(prompt, answer) for prompt, answer in zip(ids, answers, strict=True)]
    rows = rows_in_memory(texts, base, TOKENS_AT_ONCE, progress)
    return Texts(rows, tuple(p.category for p in prompts), len(rows) / len(ids), None, "transformers")


def grid_acceptance(
    base: FrozenBase,
    drafter: Path,
    texts: Texts,
    grid: Sequence[DraftShape],
    *,
    head_rows: int,
    progress: Progress,
) -> list[Acceptance]:
    """Acceptance of each shape on the same texts. `head_rows`: size of the engine's reduced draft head; 0: whole."""
    model = read_drafter(drafter, max(shape.draft_len for shape in grid)).to(base.head.device, base.head.dtype)
    vocab = draft_vocab(drafter)
    rows = None if vocab is None or not head_rows else vocab[:head_rows]
    tensors = BaseTensors(base.embedding, base.head, torch.arange(base.head.shape[0]))
    head = borrowed_head(model, base.head, rows)
    return evaluate_grid(
        model, tensors, texts.rows, grid, head=head, batch=ROWS_AT_ONCE, categories=texts.categories, progress=progress
    )


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
            f"the engine is too small to time {shape.name} at batch {batch}",
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
            assert row.batch == batch, shape.name
            found.append(StepCost(shape, batch, 1e-3 * row.redrafter_ms, 1e-3 * row.plain_ms, 0.0))
    return found
