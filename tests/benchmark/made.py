"""Results made up from chosen speeds: what a statistic should find is known."""

from __future__ import annotations

import random
from collections.abc import Sequence

from trtllm_redrafter.benchmark.records import BatchRecords, BenchResult, Difference, Record, SideRecords

CATEGORIES = ("translation", "question answering")


def record(
    item: str,
    repeat: int,
    seconds: float,
    *,
    tokens: int = 100,
    steps: int = 50,
    accepted: int = 0,
    step_seconds: float = 1.0,
    category: str = CATEGORIES[0],
    gaps: int | None = None,
) -> Record:
    first = 0.1 * seconds
    return Record(
        item=item, category=category, repeat=repeat, tokens=tokens, first_token_seconds=first, seconds=seconds,
        decode_seconds=seconds - first, step_seconds=step_seconds, steps=steps, drafted_tokens=3 * steps,
        accepted_tokens=accepted, accepted_per_position=[accepted, 0, 0], output="same", gaps=gaps,
    )  # fmt: skip


def batch_records(
    faster: float,
    *,
    batch: int = 1,
    prompts: int = 20,
    repeats: int = 3,
    noise: float = 0.0,
    machine: float = 1.0,
    seed: int = 0,
    differences: Sequence[Difference] = (),
) -> BatchRecords:
    """Drafting `faster` times as fast as autoregression on a machine of that speed; noise is relative."""
    rng = random.Random(seed)
    made = BatchRecords(batch, differences=list(differences))
    for repeat in range(repeats):
        for prompt in range(prompts):
            base = (1 + prompt % 5) / machine
            category = CATEGORIES[prompt % 2]
            for side, seconds, steps, accepted, step in (
                (made.drafting, base / faster, 50, 49, 1.0 / 50),
                (made.autoregression, base, 99, 0, 1.0 / 99),
            ):
                seconds *= 1 + rng.gauss(0, noise)
                side.records.append(
                    record(f"p{prompt:02}", repeat, seconds, steps=steps, accepted=accepted,
                           step_seconds=step * steps, category=category)
                )  # fmt: skip
                _account(side, seconds, rng)
    return made


def _account(side: SideRecords, seconds: float, rng: random.Random) -> None:
    side.wall_seconds += seconds
    side.gaps += [seconds / 100 * rng.uniform(0.9, 1.3) for _ in range(5)]


def result(*batches: BatchRecords, complete: bool = True) -> BenchResult:
    engine = {"path": "engine", "backend": "torch", "device": "cpu", "dtype": "float32", "draft_shape": "2x3",
              "roof": {"weight_bytes": 10**8, "bandwidth": 2e10, "bandwidth_from": "made up"}}  # fmt: skip
    settings = {"prompts": "built-in", "max_tokens": 100, "repeats": 3}
    environment = {
        "date": "2026-01-01T00:00:00+00:00", "command": "bench <engine> & more", "commit": None, "versions": {"a": "1"},
        "machine": {"processor": "one", "cores": 2, "device": "cpu"}, "clocks": {"mhz": 2000, "governor": None},
        "load_before": 0.1, "variables": {}, "memory": {"peak_resident_bytes": 10**9},
    }  # fmt: skip
    return BenchResult(engine, settings, environment, list(batches), complete=complete)
