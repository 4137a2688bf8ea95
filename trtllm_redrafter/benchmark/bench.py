"""`bench`: is drafting worth it on this engine? Load, ask, measure, summarize.

summary = bench(options, progress)
summary.verdicts, summary.result.complete
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import Runner
from trtllm_redrafter.backends.engine_config import TENSORRT, engine_backend, read_engine_config
from trtllm_redrafter.benchmark import environment
from trtllm_redrafter.benchmark.measure import MeasureOptions, Session, both_sides
from trtllm_redrafter.benchmark.plots import require_matplotlib
from trtllm_redrafter.benchmark.prompts import BUILT_IN, BenchPrompt, make_items, prompts_of
from trtllm_redrafter.benchmark.records import BenchResult
from trtllm_redrafter.benchmark.statistics import Bootstrap
from trtllm_redrafter.benchmark.summary import BenchSummary, summarize
from trtllm_redrafter.errors import InputError, MismatchError, UsageError
from trtllm_redrafter.fsio import check_replaceable
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.prompts.jsonl import dump_line
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.settings.schema import BenchSection
from trtllm_redrafter.settings.values import fill, parse_batches


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark: the recipe's section, and what has been looked up for it."""

    engine: Path
    baseline: Path | None
    """Engine for autoregression; None: the same engine without drafting."""
    device: str
    draft_shape: DraftShape | None
    settings: BenchSection
    overwrite: bool
    command: tuple[str, ...]
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measure(self) -> MeasureOptions:
        return fill(MeasureOptions, self.settings, batches=parse_batches(self.settings.batch))


def bootstrap_of(settings: BenchSection) -> Bootstrap:
    """How every interval of the benchmark package is computed."""
    return Bootstrap(settings.resamples, settings.confidence, settings.seed)


def bench(options: BenchOptions, progress: Progress) -> BenchSummary:
    """Measure. All input is checked before the engine is loaded; `write_report` writes the report."""
    prompts = _checked(options)
    tokens = _kv_cache_tokens(options, prompts)
    engine = _load(options.engine, options.device, options.draft_shape, tokens)
    with both_sides(engine, partial(_baseline, options, tokens)) as sides:
        runner, baseline = sides
        _check_same_vocabulary(runner, baseline)
        options.measure.check(runner, options.engine)
        options.measure.check(baseline, options.baseline or options.engine)
        result = _measure(options, runner, baseline, prompts, progress)
    return summarize(result, bootstrap_of(options.settings))


def _checked(options: BenchOptions) -> list[BenchPrompt]:
    """The prompts, after all checks that need no engine in memory."""
    if options.settings.report is not None:
        check_replaceable(options.settings.report, overwrite=options.overwrite)
        require_matplotlib()
    if engine_backend(options.engine) == TENSORRT and options.baseline is None:
        raise UsageError(
            "a TensorRT-LLM engine with a drafter always drafts",
            where=options.engine,
            remedy="build the same base without --drafter and pass that engine as --baseline",
        )
    if options.baseline is not None and not options.baseline.is_dir():
        raise InputError("the baseline engine does not exist", where=options.baseline, remedy="check --baseline")
    return prompts_of(options.settings)


def _kv_cache_tokens(options: BenchOptions, prompts: list[BenchPrompt]) -> int | None:
    """Upper bound of the tokens in the largest batch; None with a single engine, which needs no bound.

    Two TensorRT engines are on the GPU at the same time, since the sides take turns. Without a bound, the first takes
    all free memory for its KV cache, and none is left for the second one's weights. A text has at most as many tokens
    as bytes.
    """
    if options.baseline is None:
        return None
    measure, longest = options.measure, 0
    for prompt in prompts:
        asked = prompt.prompt  # as JSON, since tool calls and template arguments become tokens, too
        texts = [dump_line([*asked.as_messages(), asked.template_kwargs]), *asked.later]
        answers = (1 + len(asked.later)) * measure.max_tokens
        longest = max(longest, answers + sum(len(text.encode("utf-8", "surrogatepass")) for text in texts))
    return max(measure.batches, default=1) * (longest + _REQUEST_SLACK)


_REQUEST_SLACK = 2048
"""Tokens beyond the texts: the chat template's own, the tree under verification, a partly filled KV block."""


def _load(engine: Path, device: str, shape: DraftShape | None, kv_cache_tokens: int | None) -> Runner:
    config = read_engine_config(engine)
    return load_backend(config.backend).load(
        config, device=device, verify_hashes=False, draft_shape=shape, kv_cache_tokens=kv_cache_tokens
    )


def _baseline(options: BenchOptions, kv_cache_tokens: int | None, runner: Runner) -> Runner:
    if runner.info.draft_shape is None:
        remedy = "convert with --drafter, and pass the plain engine as --baseline"
        raise UsageError("the engine has no drafter: nothing to compare", where=options.engine, remedy=remedy)
    if options.baseline is None:
        return runner.autoregressive()
    return _load(options.baseline, options.device, None, kv_cache_tokens)


def _check_same_vocabulary(runner: Runner, baseline: Runner) -> None:
    if runner.info.vocab_size != baseline.info.vocab_size:
        raise MismatchError(
            "the two engines have different vocabularies",
            where=f"{runner.info.path} and {baseline.info.path}",
            why=f"{runner.info.vocab_size} and {baseline.info.vocab_size} tokens",
            remedy="pass a baseline of the same base model",
        )


def _measure(
    options: BenchOptions, runner: Runner, baseline: Runner, prompts: list[BenchPrompt], progress: Progress
) -> BenchResult:
    """Measure; an interruption ends the measurement and keeps the results so far."""
    measure = options.measure
    described = environment.describe(runner.info, options.command)
    kwargs = options.chat_template_kwargs
    items = make_items(baseline, prompts, max_tokens=measure.max_tokens, template_kwargs=kwargs)
    session, complete = Session(runner, baseline, items, measure), False
    engine = {**_engine(runner), "roof": environment.roof(runner.info)}
    with suppress(KeyboardInterrupt):
        session.run(progress)
        complete = True
    settings: dict[str, Any] = {
        "prompts": BUILT_IN if options.settings.prompts is None else options.settings.prompts.name,
        "requests": len(items),
        "max_tokens": measure.max_tokens,
        "repeats": measure.repeats,
        "warmup": measure.warmup,
        "decoding": "greedy",
        "baseline": "same engine" if options.baseline is None else str(options.baseline),
    }
    return BenchResult(
        engine, settings, {**described, **environment.afterwards(runner.info)}, session.batches, complete=complete
    )


def _engine(runner: Runner) -> dict[str, Any]:
    info, shape = runner.info, runner.info.draft_shape
    return {
        "path": str(info.path),
        "backend": info.backend,
        "device": info.device,
        "dtype": info.dtype,
        "draft_shape": None if shape is None else shape.name,
        "max_batch_size": info.max_batch_size,
    }
