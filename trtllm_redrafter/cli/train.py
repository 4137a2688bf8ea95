"""`train`: text and a frozen base model → a drafter; `evaluate`: how many tokens per step it brings."""

from __future__ import annotations

from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import Json, Overwrite, flag, flags, with_settings
from trtllm_redrafter.errors import VerificationError
from trtllm_redrafter.settings import Layer, resolve


@with_settings(
    flag("base", "--base,--model", required=True),
    flag("drafter", "--output", required=True),
    *flags(
        "train", "data", "prompts", "work_dir", "draft_len", "num_layers", "exit_dim", "rnn", "head", "epochs",
        "max_steps", "learning_rate", "device",
    ),
    flag("chat_template_kwargs"),
)  # fmt: skip
def train(
    given: list[Layer],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last save in --work-dir.")] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Show sizes, settings and where they come from; write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a drafter for a base model, which is not changed."""
    from trtllm_redrafter.run.options import train_options
    from trtllm_redrafter.training import plan_training
    from trtllm_redrafter.training import train as run_training
    from trtllm_redrafter.training.execute import answer_writer, work_lock

    resolved = resolve(given)
    plan = plan_training(train_options(resolved, resume=resume, overwrite=overwrite))
    if plan_only:
        say(resolved.render("", "train") + "\n\n" + plan.render())
        if as_json:
            emit("train", planned_only=True, values=resolved.as_dict(), plan=plan.as_dict())
        return
    with work_lock(plan), progress_bar() as progress, answer_writer(plan, progress) as writer:
        result = run_training(plan, progress, writer=writer)
    say(f"drafter written to {result.output}")
    if as_json:
        emit("train", planned_only=False, output=result.output, plan=plan.as_dict(), metrics=result.metrics)


@with_settings(
    flag("base", "--base,--model", required=True),
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
        found = run_evaluation(options, progress, engine=True)
    say(found.render())
    if as_json:
        emit("evaluate", **found.as_dict())
    if not found.passes:
        floor = options.settings.min_acceptance
        note(f"the best setting's acceptance length is {found.best.acceptance_length:.2f}, {floor} was asked for")
        raise typer.Exit(VerificationError.exit_code)
