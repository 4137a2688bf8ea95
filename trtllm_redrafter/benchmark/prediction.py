"""Which draft shape is fastest? Predicted from acceptance lengths and step times, without decoding with each shape.

A request of n tokens needs one pass over its prompt and (n - 1) / acceptance steps. In a full batch it also waits for
the prompts of the other requests in the batch:

    seconds = batch * prompt + (n - 1) / acceptance * step

    predict(acceptance, cost, text).speedup         # Estimate, from the uncertainty of both inputs
    recommend(predictions)[1].shape                  # by batch size; None if drafting does not pay
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_redrafter.benchmark.statistics import Estimate
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.training.acceptance import Acceptance


@dataclass(frozen=True)
class StepCost:
    """Seconds of one decoding step at one batch size, with a shape and without drafting."""

    shape: DraftShape
    batch: int
    drafting: float
    plain: float
    error: float
    """Relative standard error of their ratio; 0 if computed, not timed."""

    @property
    def ratio(self) -> float:
        return self.drafting / self.plain


@dataclass(frozen=True)
class TextSize:
    """An average request: seconds of its prompt's pass, and number of tokens generated."""

    prompt_seconds: float
    tokens: float


@dataclass(frozen=True)
class Prediction:
    """One setting at one batch size."""

    shape: DraftShape
    batch: int
    acceptance_length: Estimate
    cost: StepCost
    user_tokens_per_second: float
    plain_tokens_per_second: float
    speedup: Estimate

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def total_tokens_per_second(self) -> float:
        return self.batch * self.user_tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": self.name,
            "batch": self.batch,
            "acceptance_length": self.acceptance_length.as_dict(),
            "step_seconds": self.cost.drafting,
            "plain_step_seconds": self.cost.plain,
            "step_time_ratio": self.cost.ratio,
            "user_tokens_per_second": self.user_tokens_per_second,
            "total_tokens_per_second": self.total_tokens_per_second,
            "plain_user_tokens_per_second": self.plain_tokens_per_second,
            "speedup": self.speedup.as_dict(),
        }


def predict(acceptance: Acceptance, cost: StepCost, text: TextSize) -> Prediction:
    """Speed of one setting. Its interval combines those of the acceptance length and the step time."""

    def seconds(accepted: float, step: float) -> float:
        return cost.batch * text.prompt_seconds + (text.tokens - 1) / accepted * step

    plain, slower = seconds(1.0, cost.plain), 1 + 1.96 * cost.error
    accepted = Estimate(acceptance.acceptance_length, max(1.0, acceptance.low), acceptance.high)
    speed = plain / seconds(accepted.value, cost.drafting)
    low, high = (
        math.hypot(speed - plain / seconds(a, cost.drafting), speed - plain / seconds(accepted.value, step))
        for a, step in ((accepted.low, cost.drafting * slower), (accepted.high, cost.drafting / slower))
    )
    mine = text.tokens / seconds(accepted.value, cost.drafting)
    return Prediction(
        acceptance.shape,
        cost.batch,
        accepted,
        cost,
        mine,
        text.tokens / plain,
        Estimate(speed, speed - low, speed + high),
    )


@dataclass(frozen=True)
class Recommendation:
    """The setting recommended for a batch size; `shape` None: do not draft."""

    batch: int
    shape: DraftShape | None
    best: Prediction

    @property
    def choice(self) -> str:
        return "do not draft" if self.shape is None else self.best.name

    @property
    def reason(self) -> str:
        speed = self.best.speedup.render()
        if self.shape is None:
            return f"the best setting, {self.best.name}, is predicted at {speed}"
        sure = "" if self.best.speedup.low > 1.0 else "; the interval includes 1, measure it with --budget"
        return f"predicted speed-up {speed}{sure}"

    def render(self) -> str:
        return f"batch {self.batch}: {self.choice}, {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        chosen = None if self.shape is None else self.shape.name
        return {"batch": self.batch, "setting": chosen, "best": self.best.as_dict()}


def recommend(predictions: Sequence[Prediction]) -> dict[int, Recommendation]:
    """The fastest setting of every batch size; among equals, the one that drafts least."""
    found = {}
    for batch in sorted({p.batch for p in predictions}):
        best = ranked(predictions, batch)[0]
        found[batch] = Recommendation(batch, best.shape if best.speedup.value > 1.0 else None, best)
    return found


def ranked(predictions: Sequence[Prediction], batch: int) -> list[Prediction]:
    """Settings of a batch size, fastest first."""
    here = [p for p in predictions if p.batch == batch]
    return sorted(here, key=lambda p: (-p.speedup.value, p.shape.max_tree_tokens))


def frontier(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The Pareto frontier of speed per user and total throughput, fastest per user first."""
    kept = [
        p
        for p in predictions
        if not any(
            q.user_tokens_per_second >= p.user_tokens_per_second
            and q.total_tokens_per_second >= p.total_tokens_per_second
            and q is not p
            and (q.user_tokens_per_second, q.total_tokens_per_second)
            != (p.user_tokens_per_second, p.total_tokens_per_second)
            for q in predictions
        )
    ]
    return sorted(kept, key=lambda p: -p.user_tokens_per_second)


@dataclass(frozen=True)
class PredictionCheck:
    """A prediction and its measurement."""

    prediction: Prediction
    measured_speedup: Estimate
    measured_tokens_per_second: float
    measured_acceptance_length: float | None

    @property
    def speedup_error(self) -> float:
        """Relative error of the prediction; positive if it is too high."""
        return self.prediction.speedup.value / self.measured_speedup.value - 1

    @property
    def speed_error(self) -> float:
        return self.prediction.user_tokens_per_second / self.measured_tokens_per_second - 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": self.prediction.name,
            "batch": self.prediction.batch,
            "predicted_speedup": self.prediction.speedup.as_dict(),
            "measured_speedup": self.measured_speedup.as_dict(),
            "speedup_error": self.speedup_error,
            "predicted_tokens_per_second": self.prediction.user_tokens_per_second,
            "measured_tokens_per_second": self.measured_tokens_per_second,
            "speed_error": self.speed_error,
            "predicted_acceptance_length": self.prediction.acceptance_length.value,
            "measured_acceptance_length": self.measured_acceptance_length,
        }
