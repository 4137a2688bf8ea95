"""From a resolved recipe to the options of training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.run.options import require
from trtllm_redrafter.settings.layers import Resolved
from trtllm_redrafter.settings.training import TrainSection, parse_grid

if TYPE_CHECKING:
    from trtllm_redrafter.training import EvaluateOptions, FitOptions, TrainOptions

EPOCHS = 4.0
"""Passes over the text when neither epochs nor steps are given."""

BETAS = (0.9, 0.98)
"""AdamW's averages; the second shorter than its usual 0.999, for runs of a few thousand steps."""


def train_options(resolved: Resolved, *, resume: bool, overwrite: bool) -> TrainOptions:
    """The `train` section as `TrainOptions`, derived values filled in."""
    from trtllm_redrafter.training import DrafterOptions, HeadKind, TrainOptions, WritingOptions

    require(resolved, {"base": "--base", "drafter": "--output"}, "training")
    recipe, section = resolved.recipe, resolved.recipe.train
    assert recipe.base is not None and recipe.drafter is not None
    if section.epochs is not None and section.max_steps is not None:
        raise UsageError("epochs and max_steps are both given", remedy="give one of them")
    return TrainOptions(
        base=recipe.base,
        output=recipe.drafter,
        work_dir=section.work_dir or Path("runs") / f"train-{recipe.drafter.name}",
        data=section.data,
        prompts=section.prompts,
        drafter=DrafterOptions(
            section.draft_len, section.num_layers, section.exit_dim, section.rnn, HeadKind(section.head)
        ),
        fit=_fit_options(section),
        epochs=section.epochs or (None if section.max_steps else EPOCHS),
        writing=WritingOptions(section.max_answer_tokens, section.temperature, section.seed, section.batch),
        max_text_tokens=section.max_text_tokens,
        held_out=section.held_out,
        grid=within(parse_grid(section.grid), section.draft_len),
        draft_vocab=section.draft_vocab,
        dtype=_dtype(section.dtype, recipe.base),
        device=_device(section.device),
        batch_tokens=section.batch_tokens,
        save_every=section.save_every,
        resume=resume,
        overwrite=overwrite,
        chat_template_kwargs=recipe.chat_template_kwargs,
    )


def _fit_options(section: TrainSection) -> FitOptions:
    from trtllm_redrafter.training import FitOptions, LossOptions

    loss = LossOptions(
        kd_weight=section.kd_weight,
        ce_weight=section.ce_weight,
        kd_temperature=section.kd_temperature,
        position_weights=tuple(section.position_decay**j for j in range(section.draft_len)),
        chunk_windows=section.chunk_windows,
        compile=section.compile,
    )
    names = (
        "window", "windows", "full_windows", "accumulation", "learning_rate", "final_lr_ratio", "schedule",
        "warmup_steps", "weight_decay", "clip_norm", "seed", "log_every",
    )  # fmt: skip
    return FitOptions(
        loss=loss,
        max_steps=section.max_steps or 1,
        beta1=BETAS[0],
        beta2=BETAS[1],
        autocast=_device(section.device).startswith("cuda") if section.autocast is None else section.autocast,
        **{name: getattr(section, name) for name in names},
    )


def evaluate_options(resolved: Resolved, *, overwrite: bool) -> EvaluateOptions:
    """The `evaluate` section as `EvaluateOptions`. A default grid keeps to what the drafter was trained for."""
    from trtllm_redrafter.training import EvaluateOptions, WritingOptions

    require(resolved, {"base": "--base", "drafter": "--drafter", "evaluate.prompts": "--prompts"}, "an evaluation")
    recipe, section = resolved.recipe, resolved.recipe.evaluate
    assert recipe.base is not None and recipe.drafter is not None
    assert section.prompts is not None
    grid = parse_grid(section.grid)
    if resolved.is_default("evaluate.grid"):
        horizon = read_json(recipe.drafter / "config.json").get("draft_len")
        grid = within(grid, horizon) if isinstance(horizon, int) else grid
    return EvaluateOptions(
        base=recipe.base,
        drafter=recipe.drafter,
        prompts=section.prompts,
        grid=grid,
        writing=WritingOptions(section.max_tokens, 0.0, 0, section.batch),
        max_text_tokens=section.max_text_tokens,
        use_draft_vocab=section.draft_vocab,
        dtype=_dtype(section.dtype, recipe.base),
        device=_device(section.device),
        batch_tokens=section.batch_tokens,
        batch_rows=section.batch_rows,
        report=section.report,
        min_acceptance=section.min_acceptance,
        overwrite=overwrite,
        chat_template_kwargs=recipe.chat_template_kwargs,
    )


def within(grid: tuple[DraftShape, ...], draft_len: int) -> tuple[DraftShape, ...]:
    """The settings that draft no further than `draft_len`; the shortest one cut to it if there are none."""
    kept = tuple(shape for shape in grid if shape.draft_len <= draft_len)
    return kept or (DraftShape(grid[0].num_beams, draft_len),)


def _dtype(asked: str, base: Path) -> str:
    from trtllm_redrafter.base_models.hf_config import stated_dtype

    return asked if asked != "auto" else stated_dtype(read_json(base / "config.json")) or "float32"


def _device(asked: str) -> str:
    from trtllm_redrafter.backends import torch_device

    return torch_device(asked)
