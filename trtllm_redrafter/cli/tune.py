"""`tune`: the fastest draft shape for a recipe, predicted, and measured where asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import INTERRUPTED, emit, note, progress_bar, say
from trtllm_redrafter.cli.options import Json, Overwrite, flag, flags, with_settings
from trtllm_redrafter.fsio import check_replaceable
from trtllm_redrafter.settings import Layer, resolve


@with_settings(
    *flags("tune", "target", "prompts", "limit", "grid", "batch", "max_tokens", "budget"),
    flag("run.device"),
    flag("tune.report"),
    flag("chat_template_kwargs"),
)
def tune(
    given: list[Layer],
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with base and drafter, as configs/smollm2-demo.yaml.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find beams and draft length per batch size without building each."""
    from trtllm_redrafter.run.benchmark_options import recipe_values, target_layers, tune_options

    resolved = resolve([*target_layers(recipe), *given])
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
