"""From a resolved recipe to the options of `bench` and `tune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_redrafter.backends import torch_device
from trtllm_redrafter.backends.engine_config import TORCH, EngineConfig, engine_backend, read_engine_config
from trtllm_redrafter.base_models.hf_config import stated_dtype
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.planning.gpus import gpu
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.run.options import (
    asked_draft_shape,
    grid_for,
    require,
    tensorrt_llm_options,
    with_directories,
    with_limits,
)
from trtllm_redrafter.settings.layers import Layer, Origin, Resolved, nest
from trtllm_redrafter.settings.sources import PRESET_KEY, file_layers

if TYPE_CHECKING:
    from trtllm_redrafter.benchmark.bench import BenchOptions
    from trtllm_redrafter.benchmark.tuning import Roof, TuneOptions

RECIPE_SUFFIXES = (".yaml", ".yml")


def recipe_values(path: Path) -> dict[str, Any]:
    """The values in a recipe file itself, with its preset by name, to be written again with changes."""
    layers = file_layers(path)
    preset = {PRESET_KEY: layers[0].origin.detail} if len(layers) > 1 else {}
    return {**preset, **layers[-1].values}


def target_layers(target: Path) -> list[Layer]:
    """The layers of a command's ENGINE_OR_RECIPE argument: a recipe's values, or the engine's directory."""
    if target.suffix in RECIPE_SUFFIXES:
        return file_layers(target)
    return [Layer(Origin("argument"), nest({"engine": target}))]


def spec_bench_layer(questions: Path) -> Layer:
    """Spec-Bench's protocol: its questions, one at a time, greedily, three times, up to 1,024 tokens."""
    values = {"bench.prompts": questions, "bench.batch": "1", "bench.repeats": 3, "bench.max_tokens": 1024}
    return Layer(Origin("flag", "--spec-bench"), nest(values))


def bench_options(
    resolved: Resolved, *, name: str, baseline: Path | None, overwrite: bool, command: tuple[str, ...]
) -> BenchOptions:
    from trtllm_redrafter.benchmark.bench import BenchOptions

    engine = engine_of(resolved, name)
    return BenchOptions(
        engine=engine,
        baseline=baseline,
        device=torch_device(resolved.recipe.run.device),
        draft_shape=asked_draft_shape(resolved, read_engine_config(engine).draft_shape),
        settings=resolved.recipe.bench,
        overwrite=overwrite,
        command=command,
        chat_template_kwargs=resolved.recipe.chat_template_kwargs,
    )


def engine_of(resolved: Resolved, name: str) -> Path:
    """The engine's directory; `InputError` when it has not been built."""
    engine = with_directories(resolved, name=name).recipe.engine
    assert engine is not None
    if not engine.is_dir():
        raise InputError("there is no engine", where=engine, remedy="run `pipeline` or `build` first")
    return engine


def tune_options(resolved: Resolved, *, name: str, command: tuple[str, ...]) -> TuneOptions:
    """A target that is not `this` needs no engine; if there is one of the torch backend, it is used."""
    from trtllm_redrafter.benchmark.bench import bootstrap_of
    from trtllm_redrafter.benchmark.tuning import THIS, TuneOptions

    require(resolved, {"base": "base", "drafter": "drafter"}, "tuning")
    recipe, section = resolved.recipe, resolved.recipe.tune
    assert recipe.base is not None and recipe.drafter is not None
    engine = _torch_engine(resolved, name)
    return TuneOptions(
        base=recipe.base,
        drafter=recipe.drafter,
        engine=None if engine is None else engine.path,
        roof=None if section.target == THIS else _roof(resolved, name, section.target),
        grid=grid_for(resolved, "tune.grid", recipe.drafter),
        settings=section,
        head_rows=0 if engine is None else engine.head_rows,
        dtype=stated_dtype(read_json(recipe.base / "config.json")) or "float32",
        device=torch_device(recipe.run.device),
        bootstrap=bootstrap_of(recipe.bench),
        command=command,
        chat_template_kwargs=recipe.chat_template_kwargs,
    )


def _torch_engine(resolved: Resolved, name: str) -> EngineConfig | None:
    """The recipe's engine, if it exposes hidden states and has a drafter."""
    engine = with_directories(resolved, name=name).recipe.engine
    if engine is None or not engine.is_dir() or engine_backend(engine) != TORCH:
        return None
    config = read_engine_config(engine)
    return None if config.draft_shape is None else config


def _roof(resolved: Resolved, name: str, target: str) -> Roof:
    """The latency plan's assumptions for the recipe's model on that GPU, and what engines it can hold."""
    from trtllm_redrafter.backends.tensorrt_llm.flag_plan import plan_flags
    from trtllm_redrafter.benchmark.tuning import EngineSize, Roof
    from trtllm_redrafter.planning.memory import estimate_memory
    from trtllm_redrafter.run.hardware_plan import assumptions, recipe_model, tensorrt_llm_build_options

    row = gpu(target)
    resolved = with_directories(resolved, name=name)
    config = recipe_model(resolved).config
    resolved = with_limits(resolved, config.max_position_embeddings)
    assert resolved.recipe.build.max_seq_len is not None
    assumed = assumptions(resolved, resolved.recipe.build.max_seq_len)
    options, settings = tensorrt_llm_build_options(resolved), tensorrt_llm_options(resolved)

    def size_of(shape: DraftShape, batch: int) -> EngineSize:
        model = replace(config, draft_shape=shape)
        flags = plan_flags(model, replace(options, max_batch_size=batch), settings)
        memory = estimate_memory(model, flags.limits, row, kv_cache_fraction=settings.runtime.kv_cache_fraction)
        needed = batch * (assumed.context_len + shape.max_tree_tokens)
        refusal = "; ".join(problem.render() for problem in memory.problems()) or None
        if refusal is None and memory.kv_tokens < needed:
            asked = f"{batch} requests of {assumed.context_len} need {needed}"
            refusal = f"its KV cache holds {memory.kv_tokens} tokens, {asked}"
        return EngineSize(flags.limits.max_num_tokens, refusal)

    return Roof(row, config, assumed, size_of)
