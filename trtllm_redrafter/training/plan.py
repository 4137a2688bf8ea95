"""What a training run is asked for, and what it will read, compute and write: known before the base model is loaded.

plan = plan_training(options)
print(plan.render())          # rows, cache size, parameters, steps; nothing has been written
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import Problem, UsageError, raise_together
from trtllm_redrafter.fsio import check_replaceable
from trtllm_redrafter.paths import check_place
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.settings.schema import TrainSection
from trtllm_redrafter.settings.values import fill
from trtllm_redrafter.training.answers import WritingOptions
from trtllm_redrafter.training.cache import CachePlan, check_space, plan_cache
from trtllm_redrafter.training.data import TokenizedPrompt, TokenizedText, check_range, read_prompts, read_texts
from trtllm_redrafter.training.drafter_files import BaseIdentity
from trtllm_redrafter.training.frozen_base import base_identity, base_text, dtype_problems, with_tokenizer
from trtllm_redrafter.training.loss import LossOptions
from trtllm_redrafter.training.model import DrafterSpec, HeadKind
from trtllm_redrafter.training.rows import WindowOrder
from trtllm_redrafter.training.trainer import FitOptions

EXPORT_BYTES = 2
"""Drafters are written in bfloat16."""

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
        """Raise `UsageError` with everything that is contradictory; the schema has checked each value for itself."""
        chosen, found = self.settings, self.writing.problems()
        if chosen.kd_weight + chosen.ce_weight <= 0:
            found.append(Problem("kd_weight and ce_weight are both 0", remedy="give one of them a weight"))
        if chosen.windows % chosen.accumulation:
            what = f"{chosen.windows} windows cannot be split in {chosen.accumulation} equal parts"
            found.append(Problem(what, remedy="make windows a multiple of accumulation"))
        if chosen.epochs is not None and chosen.max_steps is not None:
            found.append(Problem("epochs and max_steps are both given", remedy="give one of them"))
        if (chosen.data is None) == (chosen.prompts is None):
            found.append(Problem("exactly one of data and prompts is needed", remedy="pass --data or --prompts"))
        raise_together(UsageError, [*found, *dtype_problems(self.dtype)], "training cannot start")


@dataclass(frozen=True)
class TrainPlan:
    """Everything decided before the run. With prompts, rows and sizes are upper limits: answers may end early."""

    options: TrainOptions
    base: BaseIdentity
    spec: DrafterSpec
    texts: tuple[TokenizedText, ...]
    prompts: tuple[TokenizedPrompt, ...]
    eos: tuple[int, ...]
    cache: CachePlan

    @property
    def exact(self) -> bool:
        return not self.prompts

    @property
    def parameters(self) -> int:
        """Number of trained parameters, without a borrowed head."""
        shapes = dict(self.spec.config.parameter_shapes())
        del shapes["lm_head.weight"]
        count = sum(math.prod(shape) for shape in shapes.values())
        config = self.spec.config
        heads = {HeadKind.FULL: config.vocab_size, HeadKind.FACTOR: config.hidden_size, HeadKind.TIED: 0}
        return count + heads[self.spec.head] * config.exit_dim

    @property
    def drafter_bytes(self) -> int:
        return EXPORT_BYTES * self.parameters

    def fit_for(self, rows: int) -> FitOptions:
        """The loop's options once the number of training rows is known."""
        fit, epochs = self.options.fit, self.options.epochs
        if epochs is None:
            return fit
        order = WindowOrder(rows, fit.window, fit.windows, fit.seed)
        return replace(fit, max_steps=max(1, math.ceil(epochs * order.steps_per_epoch)))

    def as_dict(self) -> dict[str, Any]:
        return {
            "base": str(self.options.base),
            "output": str(self.options.output),
            "work_dir": str(self.options.work_dir),
            "texts": len(self.texts) or len(self.prompts),
            "written_by_the_base": not self.exact,
            "rows": self.cache.rows,
            "rows_are_exact": self.exact,
            "forward_tokens": self.cache.forward_tokens,
            "cache_bytes": self.cache.total_bytes,
            "parameters": self.parameters,
            "drafter_bytes": self.drafter_bytes,
            "exit_dim": self.spec.config.exit_dim,
            "num_layers": self.spec.config.num_layers,
            "draft_len": self.spec.draft_len,
            "head": self.spec.head.value,
            "steps": self.fit_for(round(self.cache.rows * (1 - self.options.settings.held_out))).max_steps,
            "rows_per_step": self.options.fit.windows * self.options.fit.window,
        }

    def render(self) -> str:
        facts, most = self.as_dict(), "" if self.exact else "at most "
        answers = "" if self.exact else ", answers written by the base model"
        return "\n".join(
            [
                f"train a drafter for {facts['base']}",
                f"  text      {facts['texts']} texts{answers}; {most}{facts['rows']:,} tokens to learn",
                f"  cache     {most}{facts['cache_bytes'] / 1e6:,.1f} MB of hidden states in {facts['work_dir']}",
                f"  drafter   {facts['num_layers']} layers, exit_dim {facts['exit_dim']}, {facts['head']} head, "
                f"{facts['draft_len']} tokens ahead: {facts['parameters']:,} parameters, "
                f"{facts['drafter_bytes'] / 1e6:,.1f} MB",
                f"  training  {most}{facts['steps']:,} steps of {facts['rows_per_step']:,} tokens",
                f"  output    {facts['output']}",
            ]
        )


def plan_training(options: TrainOptions) -> TrainPlan:
    """Check options, read and tokenize the text, size everything; writes nothing."""
    options.check()
    chosen = options.settings
    check_replaceable(options.output, overwrite=options.overwrite)
    check_place(options.work_dir / "cache")
    identity = base_identity(options.base)
    spec = drafter_spec(options, identity)
    raise_together(UsageError, spec.problems(), "the drafter's sizes do not fit")
    text = base_text(options.base)
    tokenizer, eos = with_tokenizer(text, options.base), text.end_token_ids
    longest_text, kwargs = chosen.max_text_tokens, options.chat_template_kwargs
    texts: list[TokenizedText] = []
    prompts: list[TokenizedPrompt] = []
    if chosen.data is not None:
        texts = read_texts(chosen.data, tokenizer, max_tokens=longest_text, eos=eos, template_kwargs=kwargs)
        check_range(texts, chosen.data, tokenizer, identity.vocab_size)
    elif chosen.prompts is not None:
        prompts = read_prompts(chosen.prompts, tokenizer, max_tokens=longest_text, template_kwargs=kwargs)
        check_range(prompts, chosen.prompts, tokenizer, identity.vocab_size)
    longest = [TokenizedText.answer(p.token_ids, (0,) * options.writing.max_tokens) for p in prompts]
    cache = plan_cache(texts or longest, identity.hidden_size, options.dtype)
    check_space(options.work_dir, cache)
    return TrainPlan(options, identity, spec, tuple(texts), tuple(prompts), eos, cache)


def drafter_spec(options: TrainOptions, base: BaseIdentity) -> DrafterSpec:
    chosen = options.settings
    head = HeadKind(chosen.head)
    usual = base.hidden_size if head is HeadKind.TIED else 2 * base.hidden_size
    exit_dim = usual if chosen.exit_dim is None else chosen.exit_dim
    config = DrafterConfig(base.vocab_size, base.hidden_size, exit_dim, chosen.num_layers, chosen.rnn)
    return DrafterSpec(config, head, chosen.draft_len)
