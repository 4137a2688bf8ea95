"""One training run and one evaluation: a section of the recipe, and beside it what has been derived or looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import Problem, UsageError, raise_together
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.settings.schema import EvaluateSection, TrainSection
from trtllm_redrafter.settings.values import fill
from trtllm_redrafter.training.fit import FitOptions
from trtllm_redrafter.training.frozen_base import DTYPES
from trtllm_redrafter.training.loss import LossOptions
from trtllm_redrafter.training.self_distill import WritingOptions

EPOCHS = 4.0
"""Passes over the text when neither epochs nor steps are given."""

BETAS = (0.9, 0.98)
"""AdamW's averages; the second shorter than its usual 0.999, for runs of a few thousand steps."""


@dataclass(frozen=True)
class TrainOptions:
    """One training run. `settings` say whether texts (`data`) or prompts that the base model answers are learnt from.

    `work_dir` keeps answers, hidden states, the log and the training state. `dtype` and `device` have names that torch
    knows, and `grid` only shapes that the drafter will be able to draft.
    """

    base: Path
    output: Path
    work_dir: Path
    settings: TrainSection
    grid: tuple[DraftShape, ...]
    dtype: str
    device: str
    resume: bool = False
    overwrite: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def epochs(self) -> float | None:
        """None: `settings.max_steps` says how long."""
        return self.settings.epochs or (None if self.settings.max_steps else EPOCHS)

    @property
    def writing(self) -> WritingOptions:
        return fill(WritingOptions, self.settings, max_tokens=self.settings.max_answer_tokens)

    @property
    def fit(self) -> FitOptions:
        """The loop's options; where epochs say how long, its `max_steps` follows once the rows are counted."""
        chosen = self.settings
        weights = tuple(chosen.position_decay**j for j in range(chosen.draft_len))
        return fill(
            FitOptions,
            chosen,
            loss=fill(LossOptions, chosen, position_weights=weights),
            max_steps=chosen.max_steps or 1,
            beta1=BETAS[0],
            beta2=BETAS[1],
            autocast=self.device.startswith("cuda") if chosen.autocast is None else chosen.autocast,
        )

    def check(self) -> None:
        """Raise `UsageError` with everything that cannot be meant."""
        chosen = self.settings
        found = [*self.fit.problems(), *self.writing.problems()]
        if chosen.epochs is not None and chosen.max_steps is not None:
            found.append(Problem("epochs and max_steps are both given", remedy="give one of them"))
        if (chosen.data is None) == (chosen.prompts is None):
            found.append(Problem("exactly one of data and prompts is needed", remedy="pass --data or --prompts"))
        raise_together(UsageError, [*found, *_dtype_problems(self.dtype)], "training cannot start")


@dataclass(frozen=True)
class EvaluateOptions:
    """One evaluation, of the prompts in a file. `grid` holds the shapes to draft with."""

    base: Path
    drafter: Path
    prompts: Path
    settings: EvaluateSection
    grid: tuple[DraftShape, ...]
    dtype: str
    device: str
    overwrite: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def writing(self) -> WritingOptions:
        """Greedy: only then does the text not depend on the drafter."""
        return fill(WritingOptions, self.settings, temperature=0.0, seed=0)

    def check(self) -> None:
        """Raise `UsageError` with everything that cannot be meant."""
        found = [problem for shape in self.grid for problem in shape.problems()] + self.writing.problems()
        raise_together(UsageError, [*found, *_dtype_problems(self.dtype)], "the evaluation cannot start")


def _dtype_problems(dtype: str) -> list[Problem]:
    """A base model's config.json may name one that nothing here computes in."""
    return [] if dtype in DTYPES else [Problem(f"dtype is {dtype!r}", remedy=f"use one of {', '.join(DTYPES)}")]
