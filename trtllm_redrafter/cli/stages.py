"""`convert`, `build` and `pipeline`: from a base model and a drafter to an engine, step by step or by recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import DryRun, Json, Overwrite, flag, flags, with_settings
from trtllm_redrafter.cli.run import RunReport, run_prompts
from trtllm_redrafter.settings import Layer, file_layers, resolve

if TYPE_CHECKING:
    from trtllm_redrafter.run.stages import PipelinePlan, StagePlan


@with_settings(
    flag("base", "--base,--model", required=True),
    flag("drafter"),
    flag("checkpoint", "--output", required=True),
    *flags("convert", greedy="--greedy/--sampling"),
)
def convert(given: list[Layer], dry_run: DryRun = False, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Convert a Hugging Face base model and a ReDrafter drafter into a TensorRT-LLM checkpoint."""
    from trtllm_redrafter.conversion.plan import plan_conversion
    from trtllm_redrafter.conversion.writer import convert as run_conversion
    from trtllm_redrafter.run.hardware_plan import dear_search
    from trtllm_redrafter.run.options import convert_options

    resolved = resolve(given)
    plan = plan_conversion(convert_options(resolved, overwrite=overwrite))
    dear = dear_search(resolved, plan.config)
    plan = plan if dear is None else replace(plan, notes=(*plan.notes, dear))
    if dry_run:
        say(resolved.render("", "convert") + "\n\n" + plan.render())
    else:
        for line in plan.notes:
            note(f"note: {line}")
        with progress_bar() as progress:
            run_conversion(plan, progress)
        say(f"checkpoint written to {plan.options.output}")
    if as_json:
        emit("convert", output=plan.options.output, dry_run=dry_run, values=resolved.as_dict(), plan=plan.as_dict())


@with_settings(
    flag("checkpoint", required=True),
    flag("engine", "--output", required=True),
    flag("backend"),
    *flags("build"),
    flag("tensorrt_llm.gpu"),
    flag("tensorrt.compiler"),
)
def build(given: list[Layer], dry_run: DryRun = False, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Build an engine from a checkpoint."""
    from trtllm_redrafter.backends import load_backend
    from trtllm_redrafter.run.options import build_options, with_checkpoint_limits

    resolved = with_checkpoint_limits(resolve(given))
    options = build_options(resolved, overwrite=overwrite)
    chosen = load_backend(options.backend)
    plan = chosen.plan(options)
    if dry_run:
        own = [name for name in ("tensorrt_llm", "tensorrt") if getattr(options, name) is not None]
        say(resolved.render("", "build", *own) + "\n\n" + plan.render())
    else:
        with progress_bar() as progress:
            chosen.build(plan, progress)
        say(f"engine written to {options.output}")
    slow = plan.as_dict().get("executor_note")
    if slow is not None:
        note(f"note: {slow}")
    if as_json:
        emit("build", output=options.output, dry_run=dry_run, values=resolved.as_dict(), plan=plan.as_dict())


@with_settings()
def pipeline(
    given: list[Layer],
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, as configs/smollm2-demo.yaml.")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Convert, build and run as a recipe says, skipping stages whose inputs and options are unchanged."""
    from trtllm_redrafter.run.stages import plan_pipeline

    resolved = resolve([*file_layers(recipe), *given])
    plan = plan_pipeline(resolved, name=recipe.stem)
    if dry_run:
        say(plan.render())
        if as_json:
            emit("pipeline", dry_run=True, **plan.as_dict())
        return
    with plan.locked():
        done, report = _carry_out(plan, quiet=as_json)
    if as_json:
        stages = [stage.as_dict() for stage in done]
        ran = {} if report is None else report.as_dict()
        ok = {"ok": ran.pop("ok", True), "error": ran.pop("error", None)}
        emit("pipeline", **ok, dry_run=False, stages=stages, run=ran or None)
    if report is not None and report.summary.exit_code:
        raise typer.Exit(report.summary.exit_code)


def _carry_out(plan: PipelinePlan, *, quiet: bool) -> tuple[list[StagePlan], RunReport | None]:
    """All stages; an interrupted run stage keeps the results it has."""
    from trtllm_redrafter.run.stages import begin_run, record_run, run_pipeline

    done = []
    with progress_bar() as progress:
        for stage in run_pipeline(plan, progress):
            note(stage.headline)
            done.append(stage)
    last = done[-1]
    if last.name != "run" or last.status != "miss" or last.verdict is None:
        return done, None
    overwrite, resume = last.verdict.ours, last.verdict.interrupted
    begin_run(plan, last)
    report = run_prompts(plan.resolved, stats=not quiet, overwrite=overwrite, resume=resume, quiet=quiet)
    if not report.summary.exit_code:
        record_run(plan, last)
    return done, report
