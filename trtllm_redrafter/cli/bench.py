"""`bench`: does drafting pay, on an engine; `bench compare`: results against each other; `tune`: which draft shape."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import INTERRUPTED, emit, note, progress_bar, say
from trtllm_redrafter.cli.options import Json, Overwrite, flag, flags, with_settings
from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.fsio import check_replaceable
from trtllm_redrafter.settings import Layer, Resolved, resolve

COMPARE = "compare"


@with_settings(
    *flags("bench", "prompts", "limit", "batch", "max_tokens", "repeats"),
    *flags("run", "num_beams", "draft_len", "device"),
    *flags("bench", "report", "tolerance"),
    flag("chat_template_kwargs"),
)
def bench(
    given: list[Layer],
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="ENGINE_OR_RECIPE", help="Engine directory or YAML recipe; or `compare` and result files."
        ),
    ],
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="Engine for autoregression. (default: the same, not drafting)")
    ] = None,
    spec_bench: Annotated[
        Path | None, typer.Option("--spec-bench", metavar="FILE", help="Spec-Bench's questions, by its protocol.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure whether drafting pays, or compare measurements (`bench compare A.json B.json`)."""
    from trtllm_redrafter.run.benchmark_options import bench_options, spec_bench_layer, target_layers

    if target[0] == COMPARE:
        _compare([Path(t) for t in target[1:]], resolve(given), as_json=as_json)
        return
    if len(target) != 1:
        raise UsageError(f"{len(target)} engines are given", remedy="pass one, and another with --baseline")
    below = [spec_bench_layer(spec_bench)] if spec_bench is not None else []
    resolved = resolve([*target_layers(Path(target[0])), *below, *given])
    options = bench_options(
        resolved, name=Path(target[0]).stem, baseline=baseline, overwrite=overwrite, command=_command()
    )
    from trtllm_redrafter.benchmark.bench import bench as run_bench
    from trtllm_redrafter.benchmark.report import render_text, write_report

    with progress_bar() as progress:
        summary = run_bench(options, progress)
    say(render_text(summary))  # before anything can go wrong with files
    if options.settings.report is not None:
        write_report(summary, options.settings.report, overwrite=overwrite)
        note(f"report written to {options.settings.report / 'report.html'}")
    if as_json:
        emit("bench", **summary.as_dict())
    if not summary.result.complete:
        raise typer.Exit(INTERRUPTED)


def _compare(paths: list[Path], resolved: Resolved, *, as_json: bool) -> None:
    from trtllm_redrafter.benchmark.bench import bootstrap_of
    from trtllm_redrafter.benchmark.compare import compare
    from trtllm_redrafter.benchmark.records import read_result

    results = [(str(path), read_result(path)) for path in paths]
    section = resolved.recipe.bench
    found = compare(results, bootstrap_of(section), tolerance=section.tolerance)
    say(found.render())
    if as_json:
        emit("bench compare", **found.as_dict())
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def _command() -> tuple[str, ...]:
    """What was typed, with the program's name and not its place on this machine."""
    return ("trtllm-redrafter", *sys.argv[1:])


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
