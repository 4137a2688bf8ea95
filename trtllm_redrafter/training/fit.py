"""How a training loop is asked to run, what it needs of the base model, and what it reports.

options.rate_at(0), options.rate_at(options.max_steps)      # warm-up's first step, and the schedule's end
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trtllm_redrafter.errors import Problem
from trtllm_redrafter.training.loss import LossOptions

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class FitOptions:
    """How to train. `window` rows x `windows` make a step's batch, in `accumulation` parts.

    Of each part's windows, `full_windows` take their loss over the whole vocabulary and the others over
    `BaseTensors.loss_vocab` alone, with the teacher renormalised on it: a quarter of the work for the tokens that
    nearly all text is made of, while the rest still learn to stay low.
    """

    loss: LossOptions
    max_steps: int
    window: int
    windows: int
    full_windows: int
    accumulation: int
    learning_rate: float
    final_lr_ratio: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    clip_norm: float
    autocast: bool
    seed: int
    log_every: int

    def problems(self) -> list[Problem]:
        found = list(self.loss.problems())
        counts = {"max_steps": self.max_steps, "window": self.window, "windows": self.windows}
        counts |= {"accumulation": self.accumulation, "log_every": self.log_every}
        found += [Problem(f"{name} is {n}", remedy="use 1 or more") for name, n in counts.items() if n < 1]
        if self.schedule not in SCHEDULES:
            found.append(Problem(f"schedule is {self.schedule!r}", remedy=f"use one of {', '.join(SCHEDULES)}"))
        if self.learning_rate <= 0:
            found.append(Problem(f"learning_rate is {self.learning_rate}", remedy="use a positive number"))
        if self.accumulation > 0 and self.windows % self.accumulation:
            found.append(
                Problem(
                    f"{self.windows} windows cannot be split in {self.accumulation} equal parts",
                    remedy="make windows a multiple of accumulation",
                )
            )
        return found

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then down to the final ratio at the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        if self.schedule == "constant":
            return self.learning_rate
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.learning_rate * (self.final_lr_ratio + (1 - self.final_lr_ratio) * fall)


@dataclass(frozen=True)
class BaseTensors:
    """What training needs of the base model: input embedding [V, H] and LM head [V, H] (the same tensor when tied).

    `loss_vocab` [R] holds the token ids that most windows' losses are restricted to (see `FitOptions.full_windows`).
    """

    embedding: Tensor
    head: Tensor
    loss_vocab: Tensor


@dataclass(frozen=True)
class StepLog:
    """One line of the metrics file."""

    step: int
    loss: float
    per_position: list[float]
    learning_rate: float
    gradient_norm: float
    rows_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "loss": round(self.loss, 6),
            "per_position": [round(x, 6) for x in self.per_position],
            "learning_rate": self.learning_rate,
            "gradient_norm": round(self.gradient_norm, 4),
            "rows_per_second": round(self.rows_per_second, 1),
        }
