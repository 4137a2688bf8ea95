"""Summarize a result: figures, verdicts, share of the roofline; and write the result file.

summary = summarize(result, bootstrap)
print(summary.verdicts[0].render())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_redrafter.benchmark.figures import BatchFigures, Verdict, batch_figures, judge, side_figures
from trtllm_redrafter.benchmark.prompts import question_of
from trtllm_redrafter.benchmark.records import FAULT, TIE, UNEXAMINED, BatchRecords, BenchResult, Record
from trtllm_redrafter.benchmark.statistics import Bootstrap, divide
from trtllm_redrafter.fsio import without_nan

MULTI_TURN = "multi-turn conversation"
_CONVERSATION = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
_OTHER_TASKS = {"translation", "summarization", "qa", "math_reasoning", "rag"}
"""Categories of Spec-Bench's question file. Its leaderboard has one column for the first eight and one per other."""


@dataclass(frozen=True)
class RoofShare:
    """Steps relative to the memory bandwidth: base weights are read once per step, caches are not counted."""

    plain: float
    drafting: float
    one_token_roof: float
    """Tokens per second of a request that gets one token per step, at full bandwidth."""

    def as_dict(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class Identity:
    """Were the outputs the same with and without drafting?"""

    compared: int
    ties: int
    faults: int
    unexamined: int

    @property
    def same(self) -> int:
        return self.compared - self.ties - self.faults - self.unexamined

    def as_dict(self) -> dict[str, int]:
        return {**vars(self), "same": self.same}


@dataclass(frozen=True)
class BatchSummary:
    """Everything about one batch size."""

    figures: BatchFigures
    verdict: Verdict
    identity: Identity
    roof: RoofShare | None
    spec_bench: SpecBench | None

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.figures.as_dict(),
            "verdict": self.verdict.as_dict(),
            "identical_output": self.identity.as_dict(),
            "roof": None if self.roof is None else self.roof.as_dict(),
            "spec_bench": None if self.spec_bench is None else self.spec_bench.as_dict(),
        }


@dataclass(frozen=True)
class SpecBench:
    """Spec-Bench's row at batch 1, greedy: each question's speed, averaged over questions and repeats."""

    tokens_per_second: float
    baseline_tokens_per_second: float
    acceptance_length: float | None
    """What Spec-Bench calls mean accepted tokens."""
    tasks: Mapping[str, float]
    """Speed-up of each kind of question; Spec-Bench's first eight kinds are one task."""

    @property
    def speedup(self) -> float:
        return self.tokens_per_second / self.baseline_tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "tasks": dict(self.tasks), "speedup": self.speedup}


@dataclass(frozen=True)
class BenchSummary:
    """A result with its derived figures."""

    result: BenchResult
    bootstrap: Bootstrap
    batches: tuple[BatchSummary, ...]

    @property
    def verdicts(self) -> list[Verdict]:
        return [b.verdict for b in self.batches]

    def as_dict(self) -> dict[str, Any]:
        """The output of `--json`: figures without the raw records."""
        result = self.result
        value = {
            "complete": result.complete,
            "engine": dict(result.engine),
            "settings": dict(result.settings),
            "environment": dict(result.environment),
            "interval": dict(vars(self.bootstrap)),
            "summary": [b.as_dict() for b in self.batches],
        }
        found: dict[str, Any] = without_nan(value)
        return found

    def file_dict(self) -> dict[str, Any]:
        """Content of the result file: raw records and figures."""
        found: dict[str, Any] = without_nan({**self.result.as_dict(), **self.as_dict()})
        return found


def summarize(result: BenchResult, bootstrap: Bootstrap) -> BenchSummary:
    return BenchSummary(result, bootstrap, tuple(_batch(result, b, bootstrap) for b in result.batches))


def _batch(result: BenchResult, batch: BatchRecords, bootstrap: Bootstrap) -> BatchSummary:
    figures = batch_figures(batch, bootstrap)
    kinds = [d.kind for d in batch.differences]
    compared = len({r.item for r in batch.drafting.records})
    identity = Identity(compared, kinds.count(TIE), kinds.count(FAULT), kinds.count(UNEXAMINED))
    row = spec_bench_row(batch) if batch.batch == 1 else None
    return BatchSummary(figures, judge(figures, batch.differences), identity, _roof(result.engine, figures), row)


def _roof(engine: Mapping[str, Any], figures: BatchFigures) -> RoofShare | None:
    roof = engine.get("roof") or {}
    nbytes, bandwidth = roof.get("weight_bytes"), roof.get("bandwidth")
    plain, drafting = figures.autoregression.step_seconds, figures.drafting.step_seconds
    if not nbytes or not bandwidth or not plain > 0 or not drafting > 0:
        return None
    fastest = nbytes / bandwidth
    return RoofShare(fastest / plain, fastest / drafting, 1 / fastest)


def spec_bench_row(batch: BatchRecords) -> SpecBench | None:
    """Spec-Bench's figures; a question's speed is the tokens of all its turns over their time, prompts included."""
    sides = [_question_speeds(side.records) for side in (batch.drafting, batch.autoregression)]
    if not sides[0] or not sides[1]:
        return None
    task_of = _spec_bench_tasks({r.category for r in batch.drafting.records})
    means = [_means_by_task(side, task_of) for side in sides]
    tasks = {task: divide(speed, means[1].get(task, 0.0)) for task, speed in sorted(means[0].items())}
    mine, plain = (sum(speed for _, speed in side) / len(side) for side in sides)
    return SpecBench(mine, plain, side_figures(batch.drafting).acceptance_length, tasks)


def _question_speeds(records: Sequence[Record]) -> list[tuple[str, float]]:
    """Category and tokens per second of every question and repeat."""
    sums: dict[tuple[str, int], tuple[str, int, float]] = {}
    for r in records:
        key = (question_of(r.item), r.repeat)
        _, tokens, seconds = sums.get(key, (r.category, 0, 0.0))
        sums[key] = (r.category, tokens + r.tokens, seconds + r.seconds)
    return [(category, tokens / seconds) for category, tokens, seconds in sums.values() if seconds > 0]


def _spec_bench_tasks(categories: set[str]) -> dict[str, str]:
    """Category -> task. A file with categories that Spec-Bench does not have keeps its own."""
    official = categories <= _CONVERSATION | _OTHER_TASKS
    return {name: MULTI_TURN if official and name in _CONVERSATION else name for name in categories}


def _means_by_task(speeds: Sequence[tuple[str, float]], task_of: Mapping[str, str]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for category, speed in speeds:
        found.setdefault(task_of.get(category, category), []).append(speed)
    return {task: sum(values) / len(values) for task, values in found.items()}
