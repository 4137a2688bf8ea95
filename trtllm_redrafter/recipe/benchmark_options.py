"""From a resolved recipe to the options of `bench` and `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.recipe.benchmark import parse_batches
from trtllm_redrafter.recipe.layers import Layer, Origin, Resolved, nest
from trtllm_redrafter.recipe.options import draft_shape, with_directories
from trtllm_redrafter.recipe.sources import file_layers
from trtllm_redrafter.redrafter.config import DraftShape

if TYPE_CHECKING:
    from trtllm_redrafter.benchmark.bench import BenchOptions
    from trtllm_redrafter.benchmark.statistics import Bootstrap

RECIPE_SUFFIXES = (".yaml", ".yml")


def target_layers(target: Path) -> list[Layer]:
    """What a command's ENGINE_OR_RECIPE says: a recipe's values, or the engine's directory."""
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
    from trtllm_redrafter.benchmark.measure import MeasureOptions

    engine = engine_of(resolved, name)
    section = resolved.recipe.bench
    return BenchOptions(
        engine=engine,
        baseline=baseline,
        device=device_of(resolved),
        draft_shape=_shape(resolved, engine),
        prompts=section.prompts,
        limit=section.limit,
        measure=MeasureOptions(parse_batches(section.batch), section.max_tokens, section.repeats, section.warmup),
        bootstrap=bootstrap(resolved),
        report=section.report,
        overwrite=overwrite,
        command=command,
    )


def engine_of(resolved: Resolved, name: str) -> Path:
    """The engine's directory; `InputError` when it has not been built."""
    engine = with_directories(resolved, name=name).recipe.engine
    assert engine is not None
    if not engine.is_dir():
        raise InputError("there is no engine", where=engine, remedy="run `pipeline` or `build` first")
    return engine


def device_of(resolved: Resolved) -> str:
    from trtllm_redrafter.generation.session import AUTO_DEVICE, best_device

    asked = resolved.recipe.run.device
    return best_device() if asked == AUTO_DEVICE else asked


def _shape(resolved: Resolved, engine: Path) -> DraftShape | None:
    from trtllm_redrafter.generation.session import built_shape

    return draft_shape(resolved, built_shape(engine))


def bootstrap(resolved: Resolved) -> Bootstrap:
    from trtllm_redrafter.benchmark.statistics import Bootstrap

    section = resolved.recipe.bench
    return Bootstrap(section.resamples, section.confidence, section.seed)
