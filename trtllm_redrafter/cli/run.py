"""`run`: prompts through an engine, to the terminal, to a JSONL file, or both."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit
from trtllm_redrafter.cli.options import Json, flag, flags, with_settings
from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.settings import Layer, resolve


@with_settings(
    flag("engine", required=True),
    *flags(
        "run",
        prompts="--prompt",
        stop_token_ids="--stop-token-id",
        skip_special_tokens="--skip-special-tokens/--keep-special-tokens",
    ),
    flag("chat_template_kwargs"),
    flag("tensorrt_llm.api"),
)
def run(
    given: list[Layer],
    verify: Annotated[bool, typer.Option("--verify", help="Check the hashes of the engine's files first.")] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Show text as it is written, prompt by prompt. (default: one prompt, on a terminal)",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show speed and acceptance afterwards.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output file.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the results that --output has already, and write the others.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run prompts on an engine."""
    from trtllm_redrafter.cli.run_prompts import run_prompts

    resolved = resolve(given)
    asked = resolved.recipe.run
    if stream is None:
        stream = len(asked.prompts) == 1 and asked.input is None and not as_json and sys.stdout.isatty()
    if resume and (overwrite or asked.output is None):
        what = "--resume goes on with a file, --overwrite replaces it" if overwrite else "--resume needs an --output"
        raise UsageError(what, remedy="leave one of them out" if overwrite else "name the file to go on with")
    report = run_prompts(
        resolved, verify_hashes=verify, stream=stream, stats=stats, overwrite=overwrite, resume=resume, quiet=as_json
    )
    if as_json:
        emit("run", **report.as_dict())
    if report.summary.exit_code:
        raise typer.Exit(report.summary.exit_code)
