"""`evaluate`: how many tokens a step will bring, before any conversion or GPU build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import Changes, Json, Overwrite, TemplateKwargs, from_flags, setting, template_flag
from trtllm_redrafter.errors import VerificationError


def evaluate(
    base: Annotated[Path | None, setting("base", "--base", required=True)] = None,
    drafter: Annotated[Path | None, typer.Option("--drafter", help="directory of the drafter (required)")] = None,
    prompts: Annotated[Path | None, setting("evaluate.prompts", "--prompts")] = None,
    grid: Annotated[str | None, setting("evaluate.grid", "--grid")] = None,
    max_tokens: Annotated[int | None, setting("evaluate.max_tokens", "--max-tokens")] = None,
    draft_vocab: Annotated[bool | None, setting("evaluate.draft_vocab", "--draft-vocab/--whole-vocab")] = None,
    min_acceptance: Annotated[float | None, setting("evaluate.min_acceptance", "--min-acceptance")] = None,
    report: Annotated[Path | None, setting("evaluate.report", "--report")] = None,
    device: Annotated[str | None, setting("evaluate.device", "--device")] = None,
    chat_template_kwargs: TemplateKwargs = None,
    changes: Changes = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure a drafter's acceptance for every setting of a grid."""
    from trtllm_redrafter.run.training_options import evaluate_options
    from trtllm_redrafter.training import evaluate as run_evaluation

    resolved = from_flags(
        {
            "base": ("--base", base),
            "drafter": ("--drafter", drafter),
            "evaluate.prompts": ("--prompts", prompts),
            "evaluate.grid": ("--grid", grid),
            "evaluate.max_tokens": ("--max-tokens", max_tokens),
            "evaluate.draft_vocab": ("--draft-vocab/--whole-vocab", draft_vocab),
            "evaluate.min_acceptance": ("--min-acceptance", min_acceptance),
            "evaluate.report": ("--report", report),
            "evaluate.device": ("--device", device),
            **template_flag(chat_template_kwargs),
        },
        changes,
    )
    options = evaluate_options(resolved, overwrite=overwrite)
    with progress_bar() as progress:
        found = run_evaluation(options, progress)
    say(found.render())
    if as_json:
        emit("evaluate", **found.as_dict())
    if not found.passes:
        note(f"the best setting brings {found.best.walk:.2f} tokens per step, {options.min_acceptance} were asked for")
        raise typer.Exit(VerificationError.exit_code)
