"""`convert`: base model + drafter → TensorRT-LLM checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import DryRun, Json, Overwrite, from_flags, setting


def convert(
    base: Annotated[Path | None, setting("base", "--base", required=True)] = None,
    drafter: Annotated[Path | None, setting("drafter", "--drafter")] = None,
    output: Annotated[Path | None, setting("checkpoint", "--output", required=True)] = None,
    dtype: Annotated[str | None, setting("convert.dtype", "--dtype", metavar="auto|float16|bfloat16|float32")] = None,
    tp_size: Annotated[int | None, setting("convert.tp_size", "--tp-size")] = None,
    num_beams: Annotated[int | None, setting("convert.num_beams", "--num-beams")] = None,
    draft_len: Annotated[int | None, setting("convert.draft_len", "--draft-len")] = None,
    greedy: Annotated[bool | None, setting("convert.greedy", "--greedy/--sampling")] = None,
    parallel_embedding: Annotated[
        bool | None, setting("convert.parallel_embedding", "--parallel-embedding/--no-parallel-embedding")
    ] = None,
    lm_head: Annotated[str | None, setting("convert.lm_head", "--lm-head", metavar="auto|embedding|file")] = None,
    workers: Annotated[int | None, setting("convert.workers", "--workers")] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a Hugging Face base model and a ReDrafter drafter into a TensorRT-LLM checkpoint."""
    from trtllm_redrafter.conversion import convert as run_conversion
    from trtllm_redrafter.conversion import plan_conversion
    from trtllm_redrafter.run.options import convert_options

    resolved = from_flags(
        {
            "base": ("--base", base),
            "drafter": ("--drafter", drafter),
            "checkpoint": ("--output", output),
            "convert.dtype": ("--dtype", dtype),
            "convert.tp_size": ("--tp-size", tp_size),
            "convert.num_beams": ("--num-beams", num_beams),
            "convert.draft_len": ("--draft-len", draft_len),
            "convert.greedy": ("--greedy/--sampling", greedy),
            "convert.parallel_embedding": ("--[no-]parallel-embedding", parallel_embedding),
            "convert.lm_head": ("--lm-head", lm_head),
            "convert.workers": ("--workers", workers),
        }
    )
    plan = plan_conversion(convert_options(resolved, overwrite=overwrite))
    if dry_run:
        say(resolved.render("", "convert") + "\n\n" + plan.render())
    else:
        for line in plan.notes:
            note(f"note: {line}")
        with progress_bar() as progress:
            run_conversion(plan, progress)
        say(f"checkpoint written to {output}")
    if as_json:
        emit("convert", output=output, dry_run=dry_run, values=resolved.as_dict(), plan=plan.as_dict())
