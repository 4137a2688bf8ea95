"""`pipeline`: a recipe from base model to text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import DryRun, Json, with_settings
from trtllm_redrafter.settings import Layer, file_layers, resolve

if TYPE_CHECKING:
    from trtllm_redrafter.cli.run_prompts import RunReport
    from trtllm_redrafter.run.stages import PipelinePlan, StagePlan


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
    """All stages; results of an interrupted run stage are gone on with."""
    from trtllm_redrafter.cli.run_prompts import run_prompts
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
