"""`evaluate`: how many tokens a step will bring, before any conversion or GPU build."""

from __future__ import annotations

import typer

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import Json, Overwrite, flag, flags, with_settings
from trtllm_redrafter.errors import VerificationError
from trtllm_redrafter.settings import Layer, resolve


@with_settings(
    flag("base", required=True),
    flag("drafter", required=True),
    *flags(
        "evaluate", "prompts", "grid", "max_tokens", "draft_vocab", "min_acceptance", "report", "device",
        draft_vocab="--draft-vocab/--whole-vocab",
    ),
    flag("chat_template_kwargs"),
)  # fmt: skip
def evaluate(given: list[Layer], overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Measure a drafter's acceptance for every setting of a grid."""
    from trtllm_redrafter.run.options import evaluate_options
    from trtllm_redrafter.training import evaluate as run_evaluation

    resolved = resolve(given)
    options = evaluate_options(resolved, overwrite=overwrite)
    with progress_bar() as progress:
        found = run_evaluation(options, progress)
    say(found.render())
    if as_json:
        emit("evaluate", **found.as_dict())
    if not found.passes:
        floor = options.settings.min_acceptance
        note(f"the best setting's acceptance length is {found.best.acceptance_length:.2f}, {floor} was asked for")
        raise typer.Exit(VerificationError.exit_code)
