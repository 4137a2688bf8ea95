"""`train`: text and a frozen base model → a drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit, progress_bar, say
from trtllm_redrafter.cli.options import Changes, Json, Overwrite, TemplateKwargs, from_flags, setting, template_flag


def train(
    base: Annotated[Path | None, setting("base", "--base", required=True)] = None,
    output: Annotated[Path | None, typer.Option("--output", help="directory for the drafter (required)")] = None,
    data: Annotated[Path | None, setting("train.data", "--data")] = None,
    prompts: Annotated[Path | None, setting("train.prompts", "--prompts")] = None,
    work_dir: Annotated[Path | None, setting("train.work_dir", "--work-dir")] = None,
    draft_len: Annotated[int | None, setting("train.draft_len", "--draft-len")] = None,
    num_layers: Annotated[int | None, setting("train.num_layers", "--num-layers")] = None,
    exit_dim: Annotated[int | None, setting("train.exit_dim", "--exit-dim")] = None,
    rnn: Annotated[bool | None, setting("train.rnn", "--rnn/--no-rnn")] = None,
    head: Annotated[str | None, setting("train.head", "--head", metavar="full|tied|factor")] = None,
    epochs: Annotated[float | None, setting("train.epochs", "--epochs")] = None,
    max_steps: Annotated[int | None, setting("train.max_steps", "--max-steps")] = None,
    learning_rate: Annotated[float | None, setting("train.learning_rate", "--learning-rate")] = None,
    device: Annotated[str | None, setting("train.device", "--device")] = None,
    chat_template_kwargs: TemplateKwargs = None,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save in --work-dir.")] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Show sizes, settings and where they come from; write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a drafter for a base model, which stays as it is."""
    from trtllm_redrafter.run.training_options import train_options
    from trtllm_redrafter.training import plan_training
    from trtllm_redrafter.training import train as run_training
    from trtllm_redrafter.training.engine_writer import answer_writer
    from trtllm_redrafter.training.execute import work_lock

    resolved = from_flags(
        {
            "base": ("--base", base),
            "drafter": ("--output", output),
            "train.data": ("--data", data),
            "train.prompts": ("--prompts", prompts),
            "train.work_dir": ("--work-dir", work_dir),
            "train.draft_len": ("--draft-len", draft_len),
            "train.num_layers": ("--num-layers", num_layers),
            "train.exit_dim": ("--exit-dim", exit_dim),
            "train.rnn": ("--rnn/--no-rnn", rnn),
            "train.head": ("--head", head),
            "train.epochs": ("--epochs", epochs),
            "train.max_steps": ("--max-steps", max_steps),
            "train.learning_rate": ("--learning-rate", learning_rate),
            "train.device": ("--device", device),
            **template_flag(chat_template_kwargs),
        },
        changes,
    )
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
