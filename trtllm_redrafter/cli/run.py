"""`run`: prompts through an engine, to the terminal, to a JSONL file, or both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit
from trtllm_redrafter.cli.options import Json, TemplateKwargs, from_flags, setting, template_flag
from trtllm_redrafter.errors import UsageError


def run(
    engine: Annotated[Path | None, setting("engine", "--engine", required=True)] = None,
    prompt: Annotated[list[str] | None, setting("run.prompts", "--prompt")] = None,
    input_file: Annotated[Path | None, setting("run.input", "--input")] = None,
    output_file: Annotated[Path | None, setting("run.output", "--output")] = None,
    chat: Annotated[bool | None, setting("run.chat", "--chat/--no-chat")] = None,
    max_tokens: Annotated[int | None, setting("run.max_tokens", "--max-tokens")] = None,
    temperature: Annotated[float | None, setting("run.temperature", "--temperature")] = None,
    top_k: Annotated[int | None, setting("run.top_k", "--top-k")] = None,
    top_p: Annotated[float | None, setting("run.top_p", "--top-p")] = None,
    seed: Annotated[int | None, setting("run.seed", "--seed")] = None,
    stop: Annotated[list[str] | None, setting("run.stop", "--stop")] = None,
    stop_token_id: Annotated[list[int] | None, setting("run.stop_token_ids", "--stop-token-id")] = None,
    skip_special_tokens: Annotated[
        bool | None, setting("run.skip_special_tokens", "--skip-special-tokens/--keep-special-tokens")
    ] = None,
    chat_template_kwargs: TemplateKwargs = None,
    num_beams: Annotated[int | None, setting("run.num_beams", "--num-beams")] = None,
    draft_len: Annotated[int | None, setting("run.draft_len", "--draft-len")] = None,
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Decode without the drafter.")] = False,
    device: Annotated[str | None, setting("run.device", "--device")] = None,
    api: Annotated[str | None, setting("tensorrt_llm.api", "--api")] = None,
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

    resolved = from_flags(
        {
            "engine": ("--engine", engine),
            "run.prompts": ("--prompt", prompt),
            "run.input": ("--input", input_file),
            "run.output": ("--output", output_file),
            "run.chat": ("--[no-]chat", chat),
            "run.max_tokens": ("--max-tokens", max_tokens),
            "run.temperature": ("--temperature", temperature),
            "run.top_k": ("--top-k", top_k),
            "run.top_p": ("--top-p", top_p),
            "run.seed": ("--seed", seed),
            "run.stop": ("--stop", stop),
            "run.stop_token_ids": ("--stop-token-id", stop_token_id),
            "run.skip_special_tokens": ("--[skip|keep]-special-tokens", skip_special_tokens),
            **template_flag(chat_template_kwargs),
            "run.num_beams": ("--num-beams", num_beams),
            "run.draft_len": ("--draft-len", draft_len),
            "run.draft": ("--no-draft", False if no_draft else None),
            "run.device": ("--device", device),
            "tensorrt_llm.api": ("--api", api),
        }
    )
    if stream is None:
        stream = len(prompt or ()) == 1 and input_file is None and not as_json and sys.stdout.isatty()
    if resume and (overwrite or output_file is None):
        what = "--resume goes on with a file, --overwrite replaces it" if overwrite else "--resume needs an --output"
        raise UsageError(what, remedy="leave one of them out" if overwrite else "name the file to go on with")
    report = run_prompts(
        resolved, verify_hashes=verify, stream=stream, stats=stats, overwrite=overwrite, resume=resume, quiet=as_json
    )
    if as_json:
        emit("run", **report.as_dict())
    if report.summary.exit_code:
        raise typer.Exit(report.summary.exit_code)
