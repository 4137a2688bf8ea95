"""From a resolved recipe to each package's options; values that were not given are derived and recorded.

resolved = with_limits(with_directories(resolved, name="demo"))
options = build_options(resolved, overwrite=False)       # a backend's BuildOptions, every field set
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_redrafter.backends import torch_device
from trtllm_redrafter.errors import Problem, UsageError, raise_together
from trtllm_redrafter.fsio import overlaps, read_json
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.settings.layers import Resolved
from trtllm_redrafter.settings.schema import MAX_SEQ_LEN
from trtllm_redrafter.settings.values import fill, parse_grid

if TYPE_CHECKING:
    from trtllm_redrafter.backends.base import BuildOptions, SamplingParams
    from trtllm_redrafter.backends.tensorrt.compilers import CompilerOptions
    from trtllm_redrafter.backends.tensorrt_llm.options import TensorRTLLMOptions
    from trtllm_redrafter.conversion.options import ConvertOptions
    from trtllm_redrafter.training import EvaluateOptions, TrainOptions


def require(resolved: Resolved, flags: Mapping[str, str], what_for: str) -> None:
    """`UsageError` naming every key that `what_for` cannot do without, by the flag that gives it."""
    problems = [
        Problem(f"{flag} is not given", why=f"{what_for} needs it", remedy=f"pass {flag}, or set `{key}` in a recipe")
        for key, flag in flags.items()
        if resolved.value(key) is None
    ]
    raise_together(UsageError, problems, f"{what_for} cannot start")


def _keep_apart(output: Path, sources: Mapping[str, Path | None]) -> None:
    """`UsageError` when replacing `output` would delete what it is made from."""
    why = "replacing the output would delete the input, or mix with it"
    problems = [
        Problem(f"the output overlaps the {role} directory", str(output), why, "choose another --output")
        for role, source in sources.items()
        if source is not None and overlaps(output, source)
    ]
    raise_together(UsageError, problems, "the build cannot start")


def with_directories(resolved: Resolved, *, name: str) -> Resolved:
    """Fill in where a pipeline's stages go: runs/NAME/checkpoint and runs/NAME/engine."""
    if resolved.recipe.work_dir is None:
        resolved = resolved.derive({"work_dir": Path("runs") / name}, "from the recipe's name")
    work_dir = resolved.recipe.work_dir
    assert work_dir is not None
    places = {key: work_dir / key for key in ("checkpoint", "engine") if resolved.value(key) is None}
    return resolved.derive(places, "from work_dir")


def with_limits(resolved: Resolved, context: int) -> Resolved:
    """Fill in an engine's lengths from the model's context length, in tokens."""
    if resolved.recipe.build.max_seq_len is None:
        resolved = resolved.derive(
            {"build.max_seq_len": min(context, MAX_SEQ_LEN)}, f"from the model's {context} positions"
        )
    longest = resolved.recipe.build.max_seq_len
    assert longest is not None
    if resolved.recipe.build.max_input_len is None:
        resolved = resolved.derive({"build.max_input_len": max(1, longest - 1)}, "from max_seq_len")
    return resolved


def convert_options(resolved: Resolved, *, overwrite: bool) -> ConvertOptions:
    from trtllm_redrafter.conversion.options import ConvertOptions

    require(resolved, {"base": "--base", "checkpoint": "--output"}, "a conversion")
    recipe = resolved.recipe
    assert recipe.base is not None and recipe.checkpoint is not None
    return fill(
        ConvertOptions,
        recipe.convert,
        base=recipe.base,
        drafter=recipe.drafter,
        output=recipe.checkpoint,
        overwrite=overwrite,
    )


def build_options(resolved: Resolved, *, overwrite: bool) -> BuildOptions:
    """Lengths that are not given come from the checkpoint's config."""
    require(resolved, {"checkpoint": "--checkpoint", "engine": "--output"}, "a build")
    limited = with_checkpoint_limits(resolved)
    recipe = limited.recipe
    assert recipe.checkpoint is not None and recipe.engine is not None
    _keep_apart(recipe.engine, {"checkpoint": recipe.checkpoint, "tokenizer": recipe.build.tokenizer})
    settings = tensorrt_llm_options(resolved) if recipe.backend == "tensorrt-llm" else None
    options = complete_build_options(limited, recipe.backend, settings, overwrite=overwrite)
    return replace(options, tensorrt=compiler_options(resolved)) if recipe.backend == "tensorrt" else options


def compiler_options(resolved: Resolved) -> CompilerOptions:
    """The `tensorrt` section, for the GPU that the recipe plans for."""
    from trtllm_redrafter.backends.tensorrt.compilers import CompilerOptions

    return fill(CompilerOptions, resolved.recipe.tensorrt, gpu=resolved.recipe.tensorrt_llm.gpu)


def complete_build_options(
    resolved: Resolved, backend: str, settings: TensorRTLLMOptions | None, *, overwrite: bool
) -> BuildOptions:
    """Build options of a recipe whose directories and lengths are all known, given or derived."""
    from trtllm_redrafter.backends.base import BuildOptions

    recipe = resolved.recipe
    build = recipe.build
    assert recipe.checkpoint is not None and recipe.engine is not None
    assert build.max_seq_len is not None and build.max_input_len is not None
    return fill(
        BuildOptions,
        build,
        checkpoint=recipe.checkpoint,
        output=recipe.engine,
        backend=backend,
        overwrite=overwrite,
        tensorrt_llm=settings,
    )


def tensorrt_llm_options(resolved: Resolved) -> TensorRTLLMOptions:
    """The `tensorrt_llm` section, with the origin of every value its plan shows."""
    from trtllm_redrafter.backends.tensorrt_llm.options import APIS, RuntimeOptions, TensorRTLLMOptions

    section = resolved.recipe.tensorrt_llm
    origins = {key.rpartition(".")[2]: origin.render() for key, origin in resolved.origins.items()
               if key.startswith(("build.", "tensorrt_llm."))}  # fmt: skip
    runtime = fill(RuntimeOptions, section, api=section.api or APIS[0])
    return fill(TensorRTLLMOptions, section, runtime=runtime, origins=origins)


def with_checkpoint_limits(resolved: Resolved) -> Resolved:
    """Fill in an engine's lengths from the checkpoint, which is opened only when they are needed."""
    from trtllm_redrafter.checkpoint.config import read_checkpoint_config

    recipe = resolved.recipe
    if recipe.checkpoint is None or None not in (recipe.build.max_seq_len, recipe.build.max_input_len):
        return resolved
    return with_limits(resolved, read_checkpoint_config(recipe.checkpoint).max_position_embeddings)


def sampling_params(resolved: Resolved, changes: Mapping[str, Any] | None = None) -> SamplingParams:
    """The recipe's `run` section as sampling parameters; `changes` are those of one request."""
    from trtllm_redrafter.backends.base import SamplingParams

    return fill(SamplingParams, resolved.recipe.run, **(changes or {}))


def asked_draft_shape(resolved: Resolved, own: DraftShape | None) -> DraftShape | None:
    """What `run.num_beams` and `run.draft_len` ask for, over the engine's own; None: leave it as it is."""
    run = resolved.recipe.run
    if run.num_beams is None and run.draft_len is None:
        return None
    if own is None:
        raise UsageError(
            "the engine has no drafter",
            why="--num-beams and --draft-len say how much to draft",
            remedy="leave them out, or convert with --drafter",
        )
    shape = DraftShape(run.num_beams or own.num_beams, run.draft_len or own.draft_len)
    shape.check()
    return shape


def train_options(resolved: Resolved, *, resume: bool, overwrite: bool) -> TrainOptions:
    """Options of one training run, from the `train` section."""
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
    """Options of one evaluation, from the `evaluate` section."""
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
    """A grid of the recipe as shapes. A default grid has only shapes that the drafter was trained for."""
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
