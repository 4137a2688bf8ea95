"""Figures from records, with intervals.

A speed-up is a ratio of speeds: tokens over seconds of one side, divided by the other's, over the same prompts and
repeats. Its interval comes from a paired bootstrap: prompts are resampled with replacement, and so are repeats (one
draw for all prompts, since a slow minute of the machine affects them all), and each time the ratio is recomputed.

    table = Table.of(batch_records)
    speedup(table, "seconds", Bootstrap(draws=2000, level=0.95, seed=0))      # Estimate(1.62, 1.55, 1.69)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtllm_redrafter.benchmark.records import BatchRecords, Record

Array = NDArray[np.float64]

FEWEST = 5
"""Fewest measurements of both sides for an interval: a bootstrap of fewer samples is too narrow."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its confidence interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}

    def render(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are computed. The same seed gives the same interval."""

    draws: int
    level: float
    seed: int

    def weights(self, prompts: int, repeats: int) -> tuple[Array, Array]:
        """How often each prompt [D, P] and each repeat [D, R] was drawn."""
        random = np.random.default_rng(self.seed)
        return (
            random.multinomial(prompts, np.full(prompts, 1 / prompts), size=self.draws).astype(np.float64),
            random.multinomial(repeats, np.full(repeats, 1 / repeats), size=self.draws).astype(np.float64),
        )

    def other_repeats(self, repeats: int) -> Array:
        """Repeats of another measurement, drawn independently of `weights`: [D, R]."""
        random = np.random.default_rng((self.seed, 1))
        return random.multinomial(repeats, np.full(repeats, 1 / repeats), size=self.draws).astype(np.float64)

    def interval(self, value: float, samples: Array) -> Estimate:
        tail = (1 - self.level) / 2
        samples = samples[np.isfinite(samples)]
        if not len(samples):
            return Estimate(value, float("nan"), float("nan"))
        low, high = np.quantile(samples, [tail, 1 - tail])
        return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Column:
    """One side's sums by prompt and repeat, [P, R]; 0 where nothing was measured."""

    tokens: Array
    decoded: Array
    seconds: Array
    decode_seconds: Array

    def amount(self, clock: str) -> Array:
        """Tokens that belong to `clock`: all of them, or for decoding those after the first."""
        return self.tokens if clock == "seconds" else self.decoded

    def time(self, clock: str) -> Array:
        return self.seconds if clock == "seconds" else self.decode_seconds

    def speeds(self, clock: str, prompts: Array, repeats: Array) -> Array:
        """Tokens per second of each draw [D], given how often each prompt [D, P] and repeat [D, R] was drawn."""
        tokens = ((prompts @ self.amount(clock)) * repeats).sum(axis=1)
        seconds = ((prompts @ self.time(clock)) * repeats).sum(axis=1)
        speeds: Array = tokens / seconds
        return speeds

    def speed(self, clock: str) -> float:
        return divide(float(self.amount(clock).sum()), float(self.time(clock).sum()))


@dataclass(frozen=True)
class Table:
    """Both sides over the same prompts and repeats; those that only one side finished are left out."""

    items: tuple[str, ...]
    categories: tuple[str, ...]
    drafting: Column
    autoregression: Column

    @classmethod
    def of(cls, batch: BatchRecords) -> Table:
        mine, plain = _by_key(batch.drafting.records), _by_key(batch.autoregression.records)
        keys = sorted(mine.keys() & plain.keys())
        items = tuple(dict.fromkeys(item for item, _ in keys))
        repeats = sorted({repeat for _, repeat in keys})
        shape = (len(items), len(repeats))
        place = {key: (items.index(key[0]), repeats.index(key[1])) for key in keys}
        first = {item: record.category for (item, _), record in mine.items()}
        columns = [_column([(place[k], side[k]) for k in keys], shape) for side in (mine, plain)]
        return cls(items, tuple(first[item] for item in items), *columns)

    def only(self, rows: Sequence[int]) -> Table:
        """The table for some of the prompts."""
        chosen = [
            Column(*(values[list(rows)] for values in vars(side).values()))
            for side in (self.drafting, self.autoregression)
        ]
        return Table(tuple(self.items[i] for i in rows), tuple(self.categories[i] for i in rows), *chosen)

    @property
    def pairs(self) -> int:
        """Number of (prompt, repeat) pairs that both sides have measured."""
        return int((self.drafting.seconds > 0).sum())

    def whole_repeats(self) -> Table:
        """Without a repeat that was interrupted, which covers only some of the prompts."""
        kept = (self.drafting.seconds > 0).all(axis=0)
        if kept.all() or not kept.any():
            return self
        sides = [
            Column(*(values[:, kept] for values in vars(side).values()))
            for side in (self.drafting, self.autoregression)
        ]
        return Table(self.items, self.categories, *sides)

    def by_category(self) -> dict[str, Table]:
        names = dict.fromkeys(self.categories)
        return {name: self.only([i for i, c in enumerate(self.categories) if c == name]) for name in names}


def _by_key(records: Sequence[Record]) -> dict[tuple[str, int], Record]:
    return {(r.item, r.repeat): r for r in records}


def _column(found: Sequence[tuple[tuple[int, int], Record]], shape: tuple[int, int]) -> Column:
    arrays = [np.zeros(shape) for _ in range(4)]
    for place, r in found:
        for array, value in zip(arrays, (r.tokens, r.tokens - 1, r.seconds, r.decode_seconds), strict=True):
            array[place] = value
    return Column(*arrays)


def speedup(table: Table, clock: str, bootstrap: Bootstrap) -> Estimate:
    """Drafting's speed over autoregression's. `clock` is "seconds" (submission to end) or "decode_seconds"."""
    return _ratio(table.drafting, table.autoregression, clock, bootstrap, paired=True)


def speed_ratio(one: Column, other: Column, clock: str, bootstrap: Bootstrap) -> Estimate:
    """Speed of `one` over `other`, measured at different times: paired by prompt, but not by repeat."""
    return _ratio(one, other, clock, bootstrap, paired=False)


def _ratio(one: Column, other: Column, clock: str, bootstrap: Bootstrap, *, paired: bool) -> Estimate:
    prompts, repeats = one.tokens.shape
    if not prompts:
        nothing = float("nan")
        return Estimate(nothing, nothing, nothing)
    drawn, times = bootstrap.weights(prompts, repeats)
    others = times if paired else bootstrap.other_repeats(other.tokens.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = one.speeds(clock, drawn, times) / other.speeds(clock, drawn, others)
    return bootstrap.interval(divide(one.speed(clock), other.speed(clock)), samples)


def divide(a: float, b: float) -> float:
    """a / b, or NaN for b = 0: a figure that was not measured must not look like a zero."""
    return a / b if b else float("nan")


def percentiles(values: Sequence[float], at: Sequence[float] = (50, 95, 99)) -> dict[str, float | None]:
    """p50, p95, ... by linear interpolation; None without values."""
    if not len(values):
        return {f"p{q:g}": None for q in at}
    return {f"p{q:g}": float(v) for q, v in zip(at, np.percentile(np.asarray(values), at), strict=True)}
