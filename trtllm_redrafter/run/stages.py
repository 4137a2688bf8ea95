"""The stages of a recipe, and the plan that says before anything runs which of them will, and why.

plan = plan_pipeline(resolved, name="demo")
print(plan.render())        # convert  hit: inputs and options are those of 2026-01-05T10:00:00+00:00
                            # build    miss: build.max_batch_size was 8, is 16
with plan.locked():
    for stage in run_pipeline(plan, progress): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.base_models.hf_config import read_base_config
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.errors import InputError, OutputError, UsageError
from trtllm_redrafter.fsio import restore
from trtllm_redrafter.locks import exclusive
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.prompts.jsonl import check_source
from trtllm_redrafter.run.options import build_options, convert_options, require, with_directories, with_limits
from trtllm_redrafter.run.stage_cache import (
    BUILD,
    CONVERT,
    RUN,
    CacheVerdict,
    Fingerprint,
    HashCache,
    StageRecords,
    fingerprint,
    output_of,
)
from trtllm_redrafter.settings.layers import Resolved

LOCK = ".lock"
"""In the work directory, while a pipeline is being carried out there."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage will do. `verdict` None: it depends on an earlier stage's result and is decided after it."""

    name: str
    output: Path | None
    verdict: CacheVerdict | None = None
    fingerprint: Fingerprint | None = None
    details: str = ""
    waits_for: str | None = None

    @property
    def status(self) -> str:
        if self.verdict is None:
            return "later"
        return "hit" if self.verdict.hit else "miss"

    @property
    def headline(self) -> str:
        why = f"decided after {self.waits_for}" if self.verdict is None else "; ".join(self.verdict.reasons)
        return f"{self.name:<8} {self.status}: {why}"

    def render(self) -> str:
        return "\n".join([self.headline, *(f"         {line}" for line in self.details.splitlines())])

    def as_dict(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "status": self.status,
            "reasons": list(self.verdict.reasons) if self.verdict else [],
            "waits_for": self.waits_for,
            "output": None if self.output is None else str(self.output),
        }


@dataclass(frozen=True)
class PipelinePlan:
    """A resolved recipe and its stages in order."""

    resolved: Resolved
    stages: tuple[StagePlan, ...]
    records: StageRecords
    hashes: HashCache

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other pipelines out of the work directory while this one is carried out."""
        work_dir = self.resolved.recipe.work_dir
        assert work_dir is not None
        with exclusive(work_dir / LOCK, "the work directory", where=work_dir):
            yield

    def render(self) -> str:
        own = {"tensorrt-llm": ["tensorrt_llm"], "tensorrt": ["tensorrt"]}.get(self.resolved.recipe.backend, [])
        used = ("", CONVERT, BUILD, RUN, *own)
        return "\n".join([self.resolved.render(*used), "", *(stage.render() for stage in self.stages)])

    def as_dict(self) -> dict[str, Any]:
        return {"values": self.resolved.as_dict(), "stages": [stage.as_dict() for stage in self.stages]}


def plan_pipeline(resolved: Resolved, *, name: str) -> PipelinePlan:
    """Check the recipe, look at what is there, plan the stages that can be planned. Writes nothing."""
    require(resolved, {"base": "--set base=DIR"}, "a pipeline")
    resolved = with_directories(resolved, name=name)
    if resolved.recipe.build.max_seq_len is None or resolved.recipe.build.max_input_len is None:
        resolved = with_limits(resolved, _context_of_base(resolved))
    _check_run(resolved)
    assert resolved.recipe.work_dir is not None
    directory = resolved.recipe.work_dir / ".stages"
    plan = PipelinePlan(resolved, (), StageRecords(directory), HashCache(directory / "hashes.json"))
    stages = [decide(plan, CONVERT)]
    for name_ in (BUILD, RUN) if has_prompts(resolved) else (BUILD,):
        before = stages[-1]
        if before.status == "hit":
            stages.append(decide(plan, name_))
        else:
            stages.append(StagePlan(name_, output_of(name_, resolved), waits_for=before.waits_for or before.name))
    return replace(plan, stages=tuple(stages))


def run_pipeline(plan: PipelinePlan, progress: Progress) -> Iterator[StagePlan]:
    """Carry out convert and build; yields each stage, finally decided, when it is done.

    Every stage is decided anew: since the plan was made, another pipeline may have been here. The run stage is yielded
    as decided but left to the caller, who knows where its results go, between `begin_run` and `record_run`.
    """
    for planned in plan.stages:
        if planned.output is not None:
            restore(planned.output)
        stage = decide(plan, planned.name)
        if stage.status == "miss" and stage.name != RUN:
            _act(plan, stage, progress)
        yield stage


def begin_run(plan: PipelinePlan, stage: StagePlan) -> None:
    """Remember whose results are about to be written, so that they can be continued after a kill."""
    if stage.output is not None and stage.fingerprint is not None:
        plan.records.begin(stage.name, stage.fingerprint, stage.output)


def record_run(plan: PipelinePlan, stage: StagePlan) -> None:
    """Remember that the run stage's results are complete."""
    if stage.output is not None:
        _record(plan, stage, stage.output)


def decide(plan: PipelinePlan, stage: str) -> StagePlan:
    """Decide a stage whose inputs exist, and plan its work when it must run."""
    resolved = plan.resolved
    run, output = resolved.recipe.run, output_of(stage, resolved)
    if output is None:
        return StagePlan(
            stage, None, CacheVerdict(False, ("results are shown, not kept: run.output is not set",), False)
        )
    print_ = fingerprint(stage, resolved, plan.hashes)
    verdict = plan.records.check(stage, print_, output)
    if stage == RUN and run.temperature > 0.0 and run.seed is None:
        why = verdict.reasons if verdict.interrupted else ("sampling without run.seed differs each time",)
        verdict = replace(verdict, hit=False, reasons=why)
    details = "" if verdict.hit else _details(stage, resolved, verdict)
    return StagePlan(stage, output, verdict, print_, details)


def has_prompts(resolved: Resolved) -> bool:
    return bool(resolved.recipe.run.prompts) or resolved.recipe.run.input is not None


def _act(plan: PipelinePlan, stage: StagePlan, progress: Progress) -> None:
    assert stage.verdict is not None
    record = partial(_record, plan, stage)
    if stage.name == CONVERT:
        conversion = plan_conversion(convert_options(plan.resolved, overwrite=stage.verdict.ours))
        convert(conversion, progress, on_complete=record)
    else:
        options = build_options(plan.resolved, overwrite=stage.verdict.ours)
        backend = load_backend(options.backend)
        backend.build(backend.plan(options), progress, on_complete=record)


def _record(plan: PipelinePlan, stage: StagePlan, complete: Path) -> None:
    assert stage.output is not None and stage.fingerprint is not None
    plan.hashes.save()
    plan.records.store(stage.name, stage.fingerprint, stage.output, complete)


def _details(stage: str, resolved: Resolved, verdict: CacheVerdict) -> str:
    """What the stage's own plan says; it refuses here what it would refuse later."""
    if stage == CONVERT:
        return str(plan_conversion(convert_options(resolved, overwrite=verdict.ours)).render())
    if stage == BUILD:
        options = build_options(resolved, overwrite=verdict.ours)
        return load_backend(options.backend).plan(options).render()
    output = output_of(stage, resolved)
    if output is not None and output.exists() and not verdict.ours:
        remedy = "name another run.output, or remove the file"
        raise OutputError("the output exists already", where=output, remedy=remedy)
    return ""


def _context_of_base(resolved: Resolved) -> int:
    """The base model's context length, as the conversion will have it."""
    assert resolved.recipe.base is not None
    base = resolved.recipe.base
    if not base.is_dir():
        raise InputError("the base model's directory does not exist", where=base, remedy="check `base`")
    return read_base_config(base / "config.json")[0].max_position_embeddings  # a sliding window limits them


def _check_run(resolved: Resolved) -> None:
    """What would make the last stage fail after hours of the first ones."""
    recipe = resolved.recipe
    if recipe.run.input is not None and not recipe.run.input.is_file():
        check_source(recipe.run.input)
        why = "a pipeline reads it twice, for the fingerprint and for the run; a stream can be read once"
        raise InputError(
            "the prompts are not in a file", where=recipe.run.input, why=why, remedy="use `run`, or a file"
        )
    if recipe.drafter is None and (recipe.run.num_beams is not None or recipe.run.draft_len is not None):
        what = "run.num_beams and run.draft_len say how much to draft, and there is no drafter"
        raise UsageError(what, remedy="set `drafter`, or leave them out")
    if recipe.run.max_tokens >= (recipe.build.max_seq_len or 0):
        what = (
            f"run.max_tokens {recipe.run.max_tokens} leaves no room for a prompt in {recipe.build.max_seq_len} tokens"
        )
        raise UsageError(what, remedy="lower run.max_tokens, or raise build.max_seq_len")
