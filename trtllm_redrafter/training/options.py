"""What training and evaluation are asked for; every field is resolved (the recipe holds the defaults)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import Problem, UsageError, raise_together
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.training.fit import FitOptions
from trtllm_redrafter.training.frozen_base import DTYPES
from trtllm_redrafter.training.model import HeadKind
from trtllm_redrafter.training.self_distill import WritingOptions


@dataclass(frozen=True)
class DrafterOptions:
    """The drafter's form. `exit_dim` None: the hidden size for a tied head, twice that otherwise."""

    draft_len: int
    num_layers: int
    exit_dim: int | None
    rnn: bool
    head: HeadKind


@dataclass(frozen=True)
class TrainOptions:
    """One training run.

    Exactly one of `data` (texts) and `prompts` (the base writes the answers) is given. `work_dir` keeps answers, hidden
    states, the log and the training state. `epochs` sets `fit.max_steps` from the text's size where it is given. A
    share `held_out` of the texts is not trained on. `draft_vocab` token ids are listed for fast heads (0: none).
    """

    base: Path
    output: Path
    work_dir: Path
    data: Path | None
    prompts: Path | None
    drafter: DrafterOptions
    fit: FitOptions
    epochs: float | None
    writing: WritingOptions
    max_text_tokens: int
    held_out: float
    grid: tuple[DraftShape, ...]
    draft_vocab: int
    dtype: str
    device: str
    batch_tokens: int
    save_every: int
    resume: bool
    overwrite: bool
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `UsageError` with everything that cannot be meant."""
        found = [*self.fit.problems(), *self.writing.problems()]
        if (self.data is None) == (self.prompts is None):
            found.append(Problem("exactly one of data and prompts is needed", remedy="pass --data or --prompts"))
        if self.dtype not in DTYPES:
            found.append(Problem(f"dtype is {self.dtype!r}", remedy=f"use one of {', '.join(DTYPES)}"))
        if not 0.0 <= self.held_out < 1.0:
            found.append(Problem(f"held_out is {self.held_out}", remedy="use a share of 0 up to below 1"))
        if self.epochs is not None and self.epochs <= 0:
            found.append(Problem(f"epochs is {self.epochs}", remedy="use a positive number"))
        if len(self.fit.loss.position_weights) != self.drafter.draft_len:
            found.append(
                Problem(
                    f"{len(self.fit.loss.position_weights)} position weights for {self.drafter.draft_len} positions",
                    remedy="give one per drafted token",
                )
            )
        for name in ("save_every", "batch_tokens", "max_text_tokens"):
            if getattr(self, name) < 1:
                found.append(Problem(f"{name} is {getattr(self, name)}", remedy="use 1 or more"))
        raise_together(UsageError, found, "training cannot start")


@dataclass(frozen=True)
class EvaluateOptions:
    """One evaluation. `use_draft_vocab` restricts the head as a fast runtime would, if the drafter lists one.

    `min_acceptance` is a floor for the best setting's walk; `report` a directory to write to.
    """

    base: Path
    drafter: Path
    prompts: Path
    grid: tuple[DraftShape, ...]
    writing: WritingOptions
    max_text_tokens: int
    use_draft_vocab: bool
    dtype: str
    device: str
    batch_tokens: int
    batch_rows: int
    report: Path | None
    min_acceptance: float | None
    overwrite: bool
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `UsageError` with everything that cannot be meant."""
        found = [problem for shape in self.grid for problem in shape.problems()] + self.writing.problems()
        if not self.grid:
            found.append(Problem("the grid is empty", remedy="name at least one setting, such as 4x4"))
        if self.writing.temperature != 0:
            found.append(
                Problem(
                    f"temperature is {self.writing.temperature}",
                    why="only greedy text does not depend on the drafter",
                    remedy="use 0",
                )
            )
        if self.dtype not in DTYPES:
            found.append(Problem(f"dtype is {self.dtype!r}", remedy=f"use one of {', '.join(DTYPES)}"))
        raise_together(UsageError, found, "the evaluation cannot start")
