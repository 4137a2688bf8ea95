"""Run the same prompts with and without drafting, in turns, and record what each request experienced.

Both sides get the same tokens, limits and machine. Prompts are answered in rounds: each by one side, then by the other,
and which side begins alternates, so that a machine that slows down slows both. Requests are submitted one by one as
others finish, `batch` at a time; a request's time starts with its submission.

    session = Session(runner, runner, items, options)
    for _ in session.run(progress): ...      # stop at any point: session.batches holds what was measured
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trtllm_redrafter.backends.base import Request, Result, Runner, SamplingParams, Update
from trtllm_redrafter.benchmark.prompts import Item
from trtllm_redrafter.benchmark.records import (
    AUTOREGRESSION,
    DRAFTING,
    FAULT,
    SIDES,
    TIE,
    UNEXAMINED,
    BatchRecords,
    Difference,
    Record,
    SideRecords,
)
from trtllm_redrafter.errors import Problem, UsageError, raise_together
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.verify.token_checks import gap, tie_bound

ROUND = 4
"""Requests per round, as a multiple of the batch size: without a queue, a batch would mostly run half empty."""


@dataclass(frozen=True)
class MeasureOptions:
    """What is run. Decoding is greedy, so that both sides write the same texts."""

    batches: tuple[int, ...]
    max_tokens: int
    repeats: int
    warmup: int
    """Uncounted rounds at the start, per batch size and side; all, if the runner prepares itself for each shape."""

    def check(self, runner: Runner, where: Path) -> None:
        """Raise `UsageError` with all options that make no sense for this engine."""
        found = []
        if not self.batches:
            found.append(Problem("no batch size is given", remedy="pass --batch 1,4"))
        limit = runner.info.max_batch_size
        for batch in self.batches:
            if not 1 <= batch <= limit:
                remedy = f"use 1 to {limit}, or build with a larger --max-batch-size"
                found.append(Problem(f"batch {batch} is outside the engine's 1 to {limit}", remedy=remedy))
        if len(set(self.batches)) < len(self.batches):
            found.append(Problem("a batch size is given twice", remedy="name each once"))
        raise_together(UsageError, found, "the benchmark cannot start", where=where)


@contextmanager
def both_sides(
    runner: Runner, baseline: Callable[[Runner], Runner] = Runner.autoregressive
) -> Iterator[tuple[Runner, Runner]]:
    """The runner that drafts and the baseline, which may be the same; both are closed at the end."""
    with closing(runner):
        other = baseline(runner)
        try:
            yield runner, other
        finally:
            if other is not runner:
                other.close()


@dataclass
class _Open:
    """A running request: when it was submitted, and when its last update came."""

    item: Item
    submitted: float
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)


@dataclass
class RoundResult:
    """One side's round."""

    results: dict[str, Result] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0


def run_round(
    runner: Runner, items: Sequence[Item], *, batch: int, max_tokens: int, draft: bool, repeat: int
) -> RoundResult:
    """Answer `items`, `batch` at a time, recording when tokens arrive."""
    found, waiting = RoundResult(), list(items)
    running: dict[str, _Open] = {}
    sampling = SamplingParams(max_tokens)
    start = time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < batch:
                item = waiting.pop(0)
                submitted = time.perf_counter()
                running[runner.submit(Request(item.token_ids, sampling, draft=draft))] = _Open(item, submitted)
            updates = runner.step()
            now = time.perf_counter()
            for update in updates:
                _note(update, now, running, found, repeat)
    finally:
        for request_id in running:  # interrupted: leave the runner as it was
            runner.cancel(request_id)
    found.wall_seconds = time.perf_counter() - start
    return found


def _note(update: Update, now: float, running: dict[str, _Open], found: RoundResult, repeat: int) -> None:
    if update.result is not None and update.result.error is not None:
        raise update.result.error
    request = running[update.request_id]
    if update.token_ids:
        if request.first is None:
            request.first = now
        elif now > request.last:  # a prompt's first token can come together with its first step's
            request.gaps.append(now - request.last)
        request.last = now
    if update.result is not None:
        del running[update.request_id]
        found.results[request.item.item_id] = update.result
        found.records.append(_record(request, update.result, repeat))
        found.gaps += request.gaps


def _record(request: _Open, result: Result, repeat: int) -> Record:
    first = request.submitted if request.first is None else request.first
    seconds = request.last - request.submitted
    until_decoding = result.queue_seconds + result.prefill_seconds or first - request.submitted
    return Record(
        item=request.item.item_id,
        category=request.item.category,
        repeat=repeat,
        tokens=len(result.token_ids),
        first_token_seconds=first - request.submitted,
        seconds=seconds,
        decode_seconds=max(0.0, seconds - until_decoding),
        step_seconds=result.decode_seconds,
        steps=result.steps,
        drafted_tokens=result.drafted_tokens,
        accepted_tokens=result.accepted_tokens,
        accepted_per_position=list(result.accepted_per_position),
        gaps=len(request.gaps),
        output=hashlib.sha256(repr(result.token_ids).encode()).hexdigest()[:16],
    )


class Session:
    """A measurement. Each finished pair of rounds is added to `batches`."""

    def __init__(self, runner: Runner, baseline: Runner, items: Sequence[Item], options: MeasureOptions) -> None:
        check_enough(items, options.batches)
        self._runners = {DRAFTING: runner, AUTOREGRESSION: baseline}
        self._items = list(items)
        self._options = options
        self.batches: list[BatchRecords] = []

    def run(self, progress: Progress) -> None:
        """Measure everything. An interruption loses only the running pair of rounds."""
        rounds = {b: _rounds(self._items, b) for b in self._options.batches}
        total, done = self._options.repeats * sum(len(r) for r in rounds.values()), 0
        for batch in self._options.batches:
            each = self._runners[DRAFTING].prepares_shapes
            count = len(rounds[batch]) if each else self._options.warmup
            for number, items in enumerate(_warm_up(rounds[batch], count)):
                self._pair(batch, items, number)
        for repeat in range(self._options.repeats):
            for batch in self._options.batches:  # the inner loop, so that drift over repeats affects all batch sizes
                for number, items in enumerate(rounds[batch]):
                    self._keep(batch, items, self._pair(batch, items, repeat + number, repeat))
                    done += 1
                    progress("measure", done, total, "rounds")

    def _pair(self, batch: int, items: Sequence[Item], turn: int, repeat: int = 0) -> dict[str, RoundResult]:
        """Run one round on both sides; even turns begin with drafting."""
        order = SIDES if turn % 2 == 0 else SIDES[::-1]
        tokens = self._options.max_tokens
        found = {
            side: run_round(
                self._runners[side], items, batch=batch, max_tokens=tokens, draft=side == DRAFTING, repeat=repeat
            )
            for side in order
        }
        error = self._runners[DRAFTING].drafter_error
        if error is not None:  # undrafted steps would be measured as drafting
            raise error
        return found

    def _keep(self, batch: int, items: Sequence[Item], pair: dict[str, RoundResult]) -> None:
        kept = next((b for b in self.batches if b.batch == batch), None)
        if kept is None:
            kept = BatchRecords(batch)
            self.batches.append(kept)
        for side, found in pair.items():
            _add(kept.side(side), found)
        seen = {d.item for d in kept.differences}
        for item in items:
            mine, plain = (pair[side].results[item.item_id] for side in SIDES)
            if mine.token_ids != plain.token_ids and item.item_id not in seen:
                runner = self._runners[AUTOREGRESSION]
                alike = runner is self._runners[DRAFTING]
                kept.differences.append(examine(runner, item, mine.token_ids, plain.token_ids, batch, alike=alike))


def check_enough(items: Sequence[Item], batches: Sequence[int]) -> None:
    """Refuse a batch size that is never reached: its figures would be those of a smaller one."""
    if len(items) < max(batches):
        raise UsageError(
            f"{len(items)} prompts cannot fill a batch of {max(batches)}",
            remedy="give more prompts (--prompts, --limit), or smaller batches (--batch)",
        )


def _rounds(items: Sequence[Item], batch: int) -> list[Sequence[Item]]:
    """Rounds of equal size: single prompts for batch 1, else enough to keep `batch` slots busy for a while."""
    count = len(items) if batch == 1 else max(1, len(items) // (ROUND * batch))
    bounds = [i * len(items) // count for i in range(count + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


def _warm_up(rounds: Sequence[Sequence[Item]], count: int) -> list[Sequence[Item]]:
    """Rounds from the longest prompts to the shortest, so that whatever a backend prepares per length is ready."""
    ordered = sorted(rounds, key=lambda items: -max(len(item.token_ids) for item in items))
    last = max(1, count - 1)
    return [ordered[number * (len(ordered) - 1) // last] for number in range(count)]


def _add(side: SideRecords, found: RoundResult) -> None:
    side.records.extend(found.records)
    side.gaps.extend(found.gaps)
    side.wall_seconds += found.wall_seconds


def examine(
    runner: Runner, item: Item, drafted: Sequence[int], plain: Sequence[int], batch: int, *, alike: bool
) -> Difference:
    """Where two greedy texts differ that should be equal, and whether rounding explains it. The runner must be idle.

    In 16 bits, many rows computed together can round differently from a single row. Two tokens whose logits differ by
    less than that may swap places, and both texts are greedy texts of the model: a tie. A larger difference is a fault,
    and so is any difference between texts of one row-invariant executor (`alike`: one wrote both).
    """
    position = next((i for i, (a, b) in enumerate(zip(drafted, plain, strict=False)) if a != b), None)
    if position is None:  # one text ends where the other goes on
        return Difference(item.item_id, batch, min(len(drafted), len(plain)), FAULT, None, None)
    found = runner.teacher_forced((*item.token_ids, *plain[:position]), plain[position : position + 1])
    if found is None:  # this backend does not show its logits
        return Difference(item.item_id, batch, position, UNEXAMINED, None, None)
    logits = found.logits[0]
    apart = abs(gap(logits, drafted[position], plain[position]))
    bound = tie_bound(logits, runner.info.dtype)
    kind = TIE if apart <= bound and not (runner.row_invariant and alike) else FAULT
    return Difference(item.item_id, batch, position, kind, apart, bound)
