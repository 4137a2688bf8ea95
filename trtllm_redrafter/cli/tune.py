"""`tune`: the fastest draft shape for a recipe, predicted, and measured where asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import INTERRUPTED, emit, note, progress_bar, say
from trtllm_redrafter.cli.options import Changes, Json, Overwrite, TemplateKwargs, setting, template_flag
from trtllm_redrafter.fsio import check_replaceable


def tune(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with base and drafter, as configs/smollm2-demo.yaml.")],
    target: Annotated[str | None, setting("tune.target", "--target")] = None,
    prompts: Annotated[Path | None, setting("tune.prompts", "--prompts")] = None,
    limit: Annotated[int | None, setting("tune.limit", "--limit")] = None,
    grid: Annotated[str | None, setting("tune.grid", "--grid")] = None,
    batch: Annotated[str | None, setting("tune.batch", "--batch")] = None,
    max_tokens: Annotated[int | None, setting("tune.max_tokens", "--max-tokens")] = None,
    budget: Annotated[int | None, setting("tune.budget", "--budget")] = None,
    device: Annotated[str | None, setting("run.device", "--device")] = None,
    report: Annotated[Path | None, setting("tune.report", "--report")] = None,
    chat_template_kwargs: TemplateKwargs = None,
    changes: Changes = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find beams and draft length per batch size without building each."""
    from trtllm_redrafter.run.benchmark_options import recipe_values, target_layers, tune_options
    from trtllm_redrafter.settings import flag_layers, resolve, set_layer

    given = flag_layers(
        {
            "tune.target": ("--target", target),
            "tune.prompts": ("--prompts", prompts),
            "tune.limit": ("--limit", limit),
            "tune.grid": ("--grid", grid),
            "tune.batch": ("--batch", batch),
            "tune.max_tokens": ("--max-tokens", max_tokens),
            "tune.budget": ("--budget", budget),
            "run.device": ("--device", device),
            **template_flag(chat_template_kwargs),
            "tune.report": ("--report", report),
        }
    )
    resolved = resolve([*target_layers(recipe), *([set_layer(changes)] if changes else []), *given])
    options = tune_options(resolved, name=recipe.stem, command=("trtllm-redrafter", *sys.argv[1:]))
    from trtllm_redrafter.benchmark.plots import require_matplotlib
    from trtllm_redrafter.benchmark.tune_report import render_text, settings_flags, write_tune_report
    from trtllm_redrafter.benchmark.tuning import tune as run_tuning

    folder = resolved.recipe.tune.report
    if folder is not None:
        check_replaceable(folder, overwrite=overwrite)
        require_matplotlib()
    with progress_bar() as progress:
        found = run_tuning(options, progress)
    say(render_text(found))
    for line in settings_flags(found):
        say(f"  {line}")
    if folder is not None:
        write_tune_report(found, folder, recipe_values(recipe), overwrite=overwrite)
        note(f"report and recipe written to {folder}")
    if as_json:
        emit("tune", **found.as_dict())
    if not found.complete:
        raise typer.Exit(INTERRUPTED)
