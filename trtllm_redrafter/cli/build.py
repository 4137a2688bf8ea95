"""`build`: TensorRT-LLM checkpoint → engine of a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import Changes, DryRun, Json, Overwrite, from_flags, setting


def build(
    checkpoint: Annotated[Path | None, setting("checkpoint", "--checkpoint", required=True)] = None,
    output: Annotated[Path | None, setting("engine", "--output", required=True)] = None,
    backend: Annotated[str | None, setting("backend", "--backend", metavar="torch|tensorrt-llm")] = None,
    tokenizer: Annotated[Path | None, setting("build.tokenizer", "--tokenizer")] = None,
    max_batch_size: Annotated[int | None, setting("build.max_batch_size", "--max-batch-size")] = None,
    max_input_len: Annotated[int | None, setting("build.max_input_len", "--max-input-len")] = None,
    max_seq_len: Annotated[int | None, setting("build.max_seq_len", "--max-seq-len")] = None,
    gpu: Annotated[str | None, setting("tensorrt_llm.gpu", "--gpu")] = None,
    changes: Changes = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Build an engine from a checkpoint."""
    from trtllm_redrafter.backends import load_backend
    from trtllm_redrafter.run.options import build_options, with_checkpoint_limits

    resolved = with_checkpoint_limits(
        from_flags(
            {
                "checkpoint": ("--checkpoint", checkpoint),
                "engine": ("--output", output),
                "backend": ("--backend", backend),
                "build.tokenizer": ("--tokenizer", tokenizer),
                "build.max_batch_size": ("--max-batch-size", max_batch_size),
                "build.max_input_len": ("--max-input-len", max_input_len),
                "build.max_seq_len": ("--max-seq-len", max_seq_len),
                "tensorrt_llm.gpu": ("--gpu", gpu),
            },
            changes,
        )
    )
    options = build_options(resolved, overwrite=overwrite)
    chosen = load_backend(options.backend)
    plan = chosen.plan(options)
    if dry_run:
        sections = ("", "build", *(["tensorrt_llm"] if options.tensorrt_llm is not None else []))
        say(resolved.render(*sections) + "\n\n" + plan.render())
    else:
        with progress_bar() as progress:
            chosen.build(plan, progress)
        say(f"engine written to {output}")
    slow = plan.as_dict().get("executor_note")
    if slow is not None:
        note(f"note: {slow}")
    if as_json:
        emit("build", output=output, dry_run=dry_run, values=resolved.as_dict(), plan=plan.as_dict())
