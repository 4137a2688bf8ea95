"""What a batch size's records amount to: speeds, latencies, acceptance, speed-ups, by category too; and the verdict.

figures = batch_figures(result.batches[0], bootstrap)
figures.speedup.low, figures.step_time_ratio, figures.categories["translation"].speedup
judge(figures, result.batches[0].differences).answer        # "go", "no-go" or "not significant"

The verdict follows from the interval of the speed-up, not from its point estimate. An output that drafting changes by
more than rounding explains is a no-go at any speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_redrafter.backends.requests import SpecDecodingStats
from trtllm_redrafter.benchmark.records import (
    AUTOREGRESSION,
    DRAFTING,
    FAULT,
    TIE,
    UNEXAMINED,
    BatchRecords,
    Difference,
    SideRecords,
)
from trtllm_redrafter.benchmark.statistics import FEWEST, Bootstrap, Estimate, Table, divide, percentiles, speedup

GO, NO_GO, NOT_SIGNIFICANT = "go", "no-go", "not significant"


@dataclass(frozen=True)
class SideFigures:
    """One side at one batch size."""

    requests: int
    tokens: int
    tokens_per_second: float
    """All tokens over the wall time: total throughput."""
    user_tokens_per_second: float
    """Throughput of a single request, prompt included."""
    decode_tokens_per_second: float
    concurrency: float
    """Mean number of concurrent requests; below the batch size, since a round ends with a partial batch."""
    first_token_seconds: dict[str, float | None]
    gap_seconds: dict[str, float | None]
    """Time between a request's updates (inter-token latency); with drafting, an update has several tokens."""
    seconds_per_token: float
    step_seconds: float
    steps: int
    acceptance_length: float | None
    """This and the rates are those of drafted steps; None, and no rates, without any."""
    acceptance_rate: float | None
    acceptance_rate_per_position: list[float]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def side_figures(side: SideRecords) -> SideFigures:
    records, stats = side.records, SpecDecodingStats()
    for record in records:
        stats.add(record)
    drafted = stats.drafted_tokens > 0
    decoded = sum(r.tokens - 1 for r in records)
    decode_seconds = sum(r.decode_seconds for r in records)
    return SideFigures(
        requests=len(records),
        tokens=side.tokens,
        tokens_per_second=divide(side.tokens, side.wall_seconds),
        user_tokens_per_second=divide(side.tokens, sum(r.seconds for r in records)),
        decode_tokens_per_second=divide(decoded, decode_seconds),
        concurrency=divide(sum(r.seconds for r in records), side.wall_seconds),
        first_token_seconds=percentiles([r.first_token_seconds for r in records]),
        gap_seconds=percentiles(side.gaps),
        seconds_per_token=divide(decode_seconds, decoded),
        step_seconds=divide(sum(r.step_seconds for r in records), stats.steps),
        steps=stats.steps,
        acceptance_length=stats.acceptance_length if drafted else None,
        acceptance_rate=stats.acceptance_rate,
        acceptance_rate_per_position=stats.acceptance_rate_per_position if drafted else [],
    )


@dataclass(frozen=True, kw_only=True)
class CategoryFigures:
    """Both sides over one kind of prompt, and how they compare."""

    prompts: int
    drafting: SideFigures
    autoregression: SideFigures
    speedup: Estimate
    """End to end, per request: prompt and answer."""

    @property
    def step_time_ratio(self) -> float:
        """A drafting step's time over a plain one's: the acceptance length above which drafting pays."""
        return divide(self.drafting.step_seconds, self.autoregression.step_seconds)

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            DRAFTING: self.drafting.as_dict(),
            AUTOREGRESSION: self.autoregression.as_dict(),
            "speedup": self.speedup.as_dict(),
            "step_time_ratio": self.step_time_ratio,
        }


@dataclass(frozen=True, kw_only=True)
class BatchFigures(CategoryFigures):
    """Both sides over all prompts at one batch size."""

    batch: int
    decode_speedup: Estimate
    total_speedup: float
    """All tokens over all time, drafting over autoregression."""
    categories: dict[str, CategoryFigures]

    def as_dict(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            **super().as_dict(),
            "decode_speedup": self.decode_speedup.as_dict(),
            "total_speedup": self.total_speedup,
            "categories": {name: c.as_dict() for name, c in self.categories.items()},
        }


def batch_figures(batch: BatchRecords, bootstrap: Bootstrap) -> BatchFigures:
    table = Table.of(batch)
    mine, plain = side_figures(batch.drafting), side_figures(batch.autoregression)
    return BatchFigures(
        batch=batch.batch,
        prompts=len(table.items),
        drafting=mine,
        autoregression=plain,
        speedup=speedup(table, "seconds", bootstrap),
        decode_speedup=speedup(table, "decode_seconds", bootstrap),
        total_speedup=divide(mine.tokens_per_second, plain.tokens_per_second),
        categories={
            name: CategoryFigures(
                prompts=len(part.items),
                drafting=side_figures(batch.drafting.of_category(name)),
                autoregression=side_figures(batch.autoregression.of_category(name)),
                speedup=speedup(part, "seconds", bootstrap),
            )
            for name, part in table.by_category().items()
        },
    )


@dataclass(frozen=True)
class Verdict:
    """The answer for one batch size."""

    batch: int
    answer: str
    reason: str

    def render(self) -> str:
        return f"batch {self.batch}: {self.answer}. {self.reason}"

    def as_dict(self) -> dict[str, object]:
        return {"batch": self.batch, "answer": self.answer, "reason": self.reason}


def judge(figures: BatchFigures, differences: Sequence[Difference]) -> Verdict:
    """Go if the whole interval is above 1, no-go if it is below 1; otherwise not significant."""
    faults = sum(d.kind == FAULT for d in differences)
    if faults:
        reason = f"{faults} output(s) differ from autoregression by more than rounding explains; speed does not matter"
        return Verdict(figures.batch, NO_GO, reason)
    speed = figures.speedup
    few = min(figures.drafting.requests, figures.autoregression.requests) < FEWEST
    if few or not speed.low <= speed.high:  # also when nothing was measured: NaN compares false
        return Verdict(figures.batch, NOT_SIGNIFICANT, "too little was measured to say anything")
    if speed.low > 1.0:
        answer = GO
    elif speed.high < 1.0:
        answer = NO_GO
    else:
        answer = NOT_SIGNIFICANT
    return Verdict(figures.batch, answer, _reason(figures, answer) + _doubts(differences))


def _reason(figures: BatchFigures, answer: str) -> str:
    accepted, needed = figures.drafting.acceptance_length, figures.step_time_ratio
    middle = f"Answers come {figures.speedup.render()} times as fast with drafting"
    if accepted is None:
        return f"{middle}; nothing was drafted."
    steps = f"a step brings {accepted:.2f} tokens and costs as much as {needed:.2f} plain steps"
    if answer == GO:
        return f"{middle}: {steps}."
    if answer == NO_GO:
        remedy = "draft less, or train the drafter further" if accepted < needed else "look at time to first token"
        return f"{middle}: {steps}; {remedy}."
    return f"{middle}: {steps}. The interval includes 1; measure more prompts or repeats."


def _doubts(differences: Sequence[Difference]) -> str:
    text = ""
    ties = sum(d.kind == TIE for d in differences)
    unknown = sum(d.kind == UNEXAMINED for d in differences)
    if ties:
        text += f" {ties} output(s) differ by a tie: two tokens closer than rounding."
    if unknown:
        text += f" {unknown} output(s) differ, and this backend does not show why."
    return text
