"""From a resolved recipe to the options of training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_redrafter.backends import torch_device
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.run.options import require
from trtllm_redrafter.settings.layers import Resolved
from trtllm_redrafter.settings.values import parse_grid

if TYPE_CHECKING:
    from trtllm_redrafter.training import EvaluateOptions, TrainOptions


def train_options(resolved: Resolved, *, resume: bool, overwrite: bool) -> TrainOptions:
    """One run as the `train` section wants it."""
    from trtllm_redrafter.training import TrainOptions

    require(resolved, {"base": "--base", "drafter": "--output"}, "training")
    recipe, section = resolved.recipe, resolved.recipe.train
    assert recipe.base is not None and recipe.drafter is not None
    return TrainOptions(
        base=recipe.base,
        output=recipe.drafter,
        work_dir=section.work_dir or Path("runs") / f"train-{recipe.drafter.name}",
        settings=section,
        grid=within(parse_grid(section.grid), section.draft_len),
        dtype=_dtype(section.dtype, recipe.base),
        device=torch_device(section.device),
        resume=resume,
        overwrite=overwrite,
        chat_template_kwargs=recipe.chat_template_kwargs,
    )


def evaluate_options(resolved: Resolved, *, overwrite: bool) -> EvaluateOptions:
    """One evaluation as the `evaluate` section wants it."""
    from trtllm_redrafter.training import EvaluateOptions

    require(resolved, {"base": "--base", "drafter": "--drafter", "evaluate.prompts": "--prompts"}, "an evaluation")
    recipe, section = resolved.recipe, resolved.recipe.evaluate
    assert recipe.base is not None and recipe.drafter is not None and section.prompts is not None
    return EvaluateOptions(
        base=recipe.base,
        drafter=recipe.drafter,
        prompts=section.prompts,
        settings=section,
        grid=grid_for(resolved, "evaluate.grid", recipe.drafter),
        dtype=_dtype(section.dtype, recipe.base),
        device=torch_device(section.device),
        overwrite=overwrite,
        chat_template_kwargs=recipe.chat_template_kwargs,
    )


def grid_for(resolved: Resolved, key: str, drafter: Path) -> tuple[DraftShape, ...]:
    """A grid of the recipe as shapes; a default one keeps to what the drafter was trained for."""
    grid = parse_grid(resolved.value(key))
    horizon = read_json(drafter / "config.json").get("draft_len") if resolved.is_default(key) else None
    return within(grid, horizon) if isinstance(horizon, int) else grid


def within(grid: tuple[DraftShape, ...], draft_len: int) -> tuple[DraftShape, ...]:
    """The settings that draft no further than `draft_len`; the shortest one cut to it if there are none."""
    kept = tuple(shape for shape in grid if shape.draft_len <= draft_len)
    return kept or (DraftShape(grid[0].num_beams, draft_len),)


def _dtype(asked: str, base: Path) -> str:
    from trtllm_redrafter.base_models.hf_config import stated_dtype

    return asked if asked != "auto" else stated_dtype(read_json(base / "config.json")) or "float32"
