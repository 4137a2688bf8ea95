"""Compare two or more results of `bench`: what became faster or slower, and what is only noise.

The first result is the reference. Speeds are compared over the prompts both have, with intervals over prompts and
repeats; a figure is a regression if its whole interval lies below 1 by more than the tolerance. The speed-up over
autoregression is compared too: it remains comparable across machines, as speeds do not.

    report = compare([("a", read_result(a)), ("b", read_result(b))], bootstrap, tolerance=0.02)
    report.exit_code            # 8 if something regressed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm_redrafter.benchmark.page import markdown_table
from trtllm_redrafter.benchmark.records import AUTOREGRESSION, DRAFTING, BenchResult
from trtllm_redrafter.benchmark.statistics import FEWEST, Array, Bootstrap, Estimate, Table, divide, speed_ratio
from trtllm_redrafter.errors import MismatchError, Problem, UsageError, VerificationError, raise_together
from trtllm_redrafter.fsio import without_nan

SPEEDUP = "speed-up"
CLOCK = "seconds"
FASTER, SLOWER, SAME, REGRESSION = "faster", "slower", "no difference", "REGRESSION"
TOO_LITTLE = "too little measured"


@dataclass(frozen=True)
class Change:
    """One figure of a result, relative to the reference's."""

    name: str
    batch: int
    figure: str
    ratio: Estimate
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "ratio": self.ratio.as_dict()}


@dataclass(frozen=True)
class Comparison:
    """All changes, and notes on what else differs between the results."""

    reference: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    tolerance: float

    @property
    def regressions(self) -> list[Change]:
        return [c for c in self.changes if c.verdict == REGRESSION]

    @property
    def exit_code(self) -> int:
        return VerificationError.exit_code if self.regressions else 0

    def render(self) -> str:
        """A Markdown table, which reads well in a terminal too."""
        rows = []
        for c in self.changes:
            interval = f"{c.ratio.low:.3f} to {c.ratio.high:.3f}"
            rows.append([c.name, str(c.batch), c.figure, f"{c.ratio.value:.3f}", interval, c.verdict])
        header = ["result", "batch", "figure", f"against {self.reference}", "interval", "verdict"]
        count = len(self.regressions)
        last = f"{count} regression(s)" if count else "no regression"
        return "\n".join([markdown_table(header, rows), "", *(f"note: {n}" for n in self.notes), last])

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = without_nan(
            {
                "reference": self.reference,
                "tolerance": self.tolerance,
                "changes": [c.as_dict() for c in self.changes],
                "regressions": len(self.regressions),
                "notes": list(self.notes),
            }
        )
        return found


def compare(results: Sequence[tuple[str, BenchResult]], bootstrap: Bootstrap, *, tolerance: float) -> Comparison:
    """Compare every later result with the first."""
    if len(results) < 2:
        raise UsageError("two results are needed", remedy="pass two result.json files, the older one first")
    (reference, old), later = results[0], results[1:]
    changes: list[Change] = []
    problems: list[Problem] = []
    notes = [note for name, new in later for note in _notes(reference, old, name, new)]
    for name, new in later:
        tables = {b.batch: Table.of(b) for b in new.batches}
        found = 0
        for batch in old.batches:
            if batch.batch in tables:
                one, other = _shared(tables[batch.batch], Table.of(batch))
                if one.items:
                    found += 1
                    changes += _changes(name, batch.batch, one, other, bootstrap, tolerance)
        if not found:
            remedy = "measure both with the same --prompts and --batch"
            problems.append(Problem(f"{name} shares no batch size and prompt with {reference}", remedy=remedy))
    raise_together(MismatchError, problems, "the results cannot be compared")
    return Comparison(reference, tuple(changes), tuple(notes), tolerance)


def _shared(one: Table, other: Table) -> tuple[Table, Table]:
    items = [item for item in one.items if item in other.items]
    tables = one.only([one.items.index(i) for i in items]), other.only([other.items.index(i) for i in items])
    return tables[0].whole_repeats(), tables[1].whole_repeats()  # the same mix of prompts on both sides


def _changes(name: str, batch: int, new: Table, old: Table, bootstrap: Bootstrap, tolerance: float) -> list[Change]:
    figures = {
        f"{DRAFTING}, tokens/s": speed_ratio(new.drafting, old.drafting, CLOCK, bootstrap),
        f"{AUTOREGRESSION}, tokens/s": speed_ratio(new.autoregression, old.autoregression, CLOCK, bootstrap),
        SPEEDUP: _speedup_ratio(new, old, bootstrap),
    }
    few = min(new.pairs, old.pairs) < FEWEST
    return [
        Change(name, batch, figure, ratio, TOO_LITTLE if few else _verdict(ratio, tolerance))
        for figure, ratio in figures.items()
    ]


def _verdict(ratio: Estimate, tolerance: float) -> str:
    if not ratio.low <= ratio.high:  # NaN
        return TOO_LITTLE
    if ratio.high < 1.0 - tolerance:
        return REGRESSION
    if ratio.high < 1.0:
        return SLOWER
    return FASTER if ratio.low > 1.0 else SAME


def _speedup_ratio(new: Table, old: Table, bootstrap: Bootstrap) -> Estimate:
    """Change of the speed-up over autoregression; within a result, repeats are paired."""
    prompts, repeats = new.drafting.tokens.shape
    drawn, times = bootstrap.weights(prompts, repeats)
    old_times = bootstrap.other_repeats(old.drafting.tokens.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = _speedups(new, drawn, times) / _speedups(old, drawn, old_times)
    before, after = (divide(t.drafting.speed(CLOCK), t.autoregression.speed(CLOCK)) for t in (old, new))
    return bootstrap.interval(divide(after, before), samples)


def _speedups(table: Table, prompts: Array, repeats: Array) -> Array:
    quotient: Array = table.drafting.speeds(CLOCK, prompts, repeats) / table.autoregression.speeds(
        CLOCK, prompts, repeats
    )
    return quotient


def _notes(reference: str, old: BenchResult, name: str, new: BenchResult) -> list[str]:
    """Differences besides what is under test."""
    found = []
    pairs = {
        "machine": (old.environment["machine"], new.environment["machine"]),
        "max_tokens": (old.settings.get("max_tokens"), new.settings.get("max_tokens")),
        "prompts": (old.settings.get("prompts"), new.settings.get("prompts")),
    }
    for what, (before, after) in pairs.items():
        if before != after:
            found.append(f"{what} differs between {reference} and {name}: {before} and {after}")
    for label, result in ((reference, old), (name, new)):
        if not result.complete:
            found.append(f"{label} was interrupted and is not complete")
    return list(dict.fromkeys(found))
