"""`tune`: the fastest draft shape per batch size, predicted from acceptance and step time, then checked on request.

found = tune(options, progress)
found.recommendations[1].render()
found.checks                        # with a budget: predictions and their measurements
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import Runner
from trtllm_redrafter.backends.torch.backend import TorchBackend
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.benchmark import environment
from trtllm_redrafter.benchmark.figures import batch_figures
from trtllm_redrafter.benchmark.measure import MeasureOptions, Session, both_sides, check_enough
from trtllm_redrafter.benchmark.prediction import (
    Prediction,
    PredictionCheck,
    Recommendation,
    TextSize,
    frontier,
    predict,
    ranked,
    recommend,
)
from trtllm_redrafter.benchmark.prompts import Item, make_items, prompts_of
from trtllm_redrafter.benchmark.statistics import Bootstrap
from trtllm_redrafter.benchmark.tuning_inputs import (
    Texts,
    Timing,
    engine_texts,
    grid_acceptance,
    measured_costs,
    roofline_costs,
    transformers_texts,
)
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.errors import MismatchError, Problem, UsageError, raise_together
from trtllm_redrafter.planning.gpus import Gpu
from trtllm_redrafter.planning.latency import Assumptions
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.settings.schema import TuneSection
from trtllm_redrafter.settings.values import parse_batches
from trtllm_redrafter.training.frozen_base import FrozenBase

THIS = "this"
CHECK_REPEATS = 3


@dataclass(frozen=True)
class EngineSize:
    """An engine for one setting and batch size: its token limit; `refusal` says why the batch does not fit, or None."""

    max_num_tokens: int
    refusal: str | None


@dataclass(frozen=True)
class Roof:
    """A target GPU other than this machine's."""

    gpu: Gpu
    config: CheckpointConfig
    assumptions: Assumptions
    size_of: Callable[[DraftShape, int], EngineSize]


@dataclass(frozen=True)
class TuneOptions:
    """One search: the recipe's section, and what has been looked up for it.

    `roof` None: tune for this machine. `engine`: a torch engine, or None. `grid`: the shapes to compare.
    """

    base: Path
    drafter: Path
    engine: Path | None
    roof: Roof | None
    grid: tuple[DraftShape, ...]
    settings: TuneSection
    head_rows: int
    dtype: str
    device: str
    bootstrap: Bootstrap
    command: tuple[str, ...]
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batches(self) -> tuple[int, ...]:
        return parse_batches(self.settings.batch)

    def check(self) -> None:
        """Raise `UsageError` with all options that contradict each other."""
        found = [problem for shape in self.grid for problem in shape.problems()]
        if self.roof is None and self.engine is None:
            remedy = "run `pipeline` on the recipe first, or name a --target GPU"
            found.append(Problem("tuning for this machine needs the recipe's torch engine", remedy=remedy))
        if self.roof is not None and self.settings.budget:
            remedy = "leave --budget out, and run `bench` on that GPU"
            found.append(Problem("--budget measures on this machine, the target is another", remedy=remedy))
        raise_together(UsageError, found, "tuning cannot start")


@dataclass(frozen=True)
class TuneResult:
    """Predictions for the whole grid, recommendations and checks."""

    target: str
    predictions: tuple[Prediction, ...]
    checks: tuple[PredictionCheck, ...]
    facts: dict[str, Any]
    complete: bool = True
    """False if the measurements of `budget` were interrupted; the predictions are complete in any case."""

    @property
    def recommendations(self) -> dict[int, Recommendation]:
        return recommend(self.predictions)

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "complete": self.complete,
            "recommendations": [r.as_dict() for r in self.recommendations.values()],
            "frontier": [{"setting": p.name, "batch": p.batch} for p in frontier(self.predictions)],
            "checks": [c.as_dict() for c in self.checks],
            "predictions": [p.as_dict() for p in self.predictions],
            **self.facts,
        }


def tune(options: TuneOptions, progress: Progress) -> TuneResult:
    """Record texts, draft along them with every shape, time the steps, predict; measure the best `budget` settings."""
    options.check()
    base = FrozenBase.load(options.base, device=options.device, dtype=options.dtype)
    items, texts, facts = _recorded(options, base, progress)
    if texts.mean_tokens <= 1.0:
        raise UsageError(
            "the base model ends every text at its first token, so there is nothing to draft",
            where=options.base,
            remedy="pass other --prompts; a base model without a chat template needs texts to continue",
        )
    accepted = grid_acceptance(
        base, options.drafter, texts, options.grid, head_rows=options.head_rows, progress=progress
    )
    del base
    predictions = _predict(options, items, texts, {a.shape: a for a in accepted}, progress)
    if options.roof is not None:
        predictions, sizes = _that_fit(options.roof, predictions)
        facts |= sizes
    facts |= {
        "texts": len(texts.categories),
        "tokens": len(texts.rows),
        "written_by": texts.written_by,
        "max_tokens": options.settings.max_tokens,
        "step_cost": "roofline" if options.roof else f"means of {options.settings.steps} steps",
    }
    checks: list[PredictionCheck] = []
    target, complete = THIS if options.roof is None else options.roof.gpu.name, False
    with suppress(KeyboardInterrupt):
        for check in _checks(options, predictions, items, progress):
            checks.append(check)
        complete = True
    return TuneResult(target, tuple(predictions), tuple(checks), facts, complete)


def _that_fit(roof: Roof, predictions: Sequence[Prediction]) -> tuple[list[Prediction], dict[str, Any]]:
    """Predictions whose batch fits the GPU; the names of the others, and the limits of the recommended engines."""
    sizes = {(p.shape, p.batch): roof.size_of(p.shape, p.batch) for p in predictions}
    left_out = [
        {"setting": p.name, "batch": p.batch, "why": size.refusal}
        for p in predictions
        if (size := sizes[p.shape, p.batch]).refusal is not None
    ]
    kept = [p for p in predictions if sizes[p.shape, p.batch].refusal is None]
    if not kept:
        why = str(left_out[0]["why"])
        remedy = "use more ranks, FP8 weights, shorter texts (build.max_seq_len), or smaller batches and trees"
        raise MismatchError("no setting fits the target", where=roof.gpu.title, why=why, remedy=remedy)
    limits = [
        {"batch": r.batch, "setting": r.best.name, "max_num_tokens": sizes[r.best.shape, r.batch].max_num_tokens}
        for r in recommend(kept).values()
    ]
    return kept, {"left_out": left_out, "engine_limits": limits}


def _load(engine: Path, device: str, shape: DraftShape | None) -> TorchRunner:
    return TorchBackend().load(engine, device=device, verify_hashes=False, draft_shape=shape)


def _recorded(options: TuneOptions, base: FrozenBase, progress: Progress) -> tuple[list[Item], Texts, dict[str, Any]]:
    """The prompts' texts, by the engine if there is one; its requests to time steps with; what it was measured on."""
    prompts, max_tokens, kwargs = (
        prompts_of(options.settings),
        options.settings.max_tokens,
        options.chat_template_kwargs,
    )
    if options.engine is None:
        texts = transformers_texts(
            base, prompts, max_tokens=max_tokens, batch=16, progress=progress, template_kwargs=kwargs
        )
        return [], texts, {}
    with closing(_load(options.engine, options.device, None)) as runner:
        if options.roof is None:
            MeasureOptions(options.batches, max_tokens, CHECK_REPEATS, 1).check(runner, runner.info.path)
        items = make_items(runner, prompts, max_tokens=max_tokens, template_kwargs=kwargs)
        if options.settings.budget:
            check_enough(items, options.batches)
        texts = engine_texts(runner, items, max_tokens=max_tokens, progress=progress)
        return items, texts, {"environment": environment.describe(runner.info, options.command)}


def _predict(
    options: TuneOptions, items: Sequence[Item], texts: Texts, accepted: dict[DraftShape, Any], progress: Progress
) -> list[Prediction]:
    """Predict every setting. For another GPU, prompts are left out: only decoding is predicted."""
    if options.roof is not None:
        roof = options.roof
        costs = roofline_costs(roof.config, roof.gpu, roof.assumptions, options.grid, options.batches)
        size = TextSize(0.0, texts.mean_tokens)
    else:
        assert options.engine is not None and texts.prompt_seconds is not None
        load: Callable[[DraftShape], Runner] = partial(_load, options.engine, options.device)
        costs = measured_costs(load, options.grid, items, Timing(options.batches, options.settings.steps), progress)
        size = TextSize(texts.prompt_seconds, texts.mean_tokens)
    return [predict(accepted[cost.shape], cost, size) for cost in costs]


def _checks(
    options: TuneOptions, predictions: Sequence[Prediction], items: Sequence[Item], progress: Progress
) -> Iterator[PredictionCheck]:
    """Measure the best `budget` settings of every batch size as `bench` does."""
    for batch in options.batches if options.settings.budget else ():
        for prediction in ranked(predictions, batch)[: options.settings.budget]:
            assert options.engine is not None
            with both_sides(_load(options.engine, options.device, prediction.shape)) as (runner, plain_runner):
                measure = MeasureOptions((batch,), options.settings.max_tokens, CHECK_REPEATS, warmup=1)
                session = Session(runner, plain_runner, items, measure)
                session.run(progress)
            figures = batch_figures(session.batches[0], options.bootstrap)
            mine = figures.drafting
            yield PredictionCheck(prediction, figures.speedup, mine.user_tokens_per_second, mine.acceptance_length)
