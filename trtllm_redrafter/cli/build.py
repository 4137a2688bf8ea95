"""`build`: TensorRT-LLM checkpoint → engine of a backend."""

from __future__ import annotations

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import DryRun, Json, Overwrite, flag, flags, with_settings
from trtllm_redrafter.settings import Layer, resolve


@with_settings(
    flag("checkpoint", required=True),
    flag("engine", "--output", required=True),
    flag("backend"),
    *flags("build"),
    flag("tensorrt_llm.gpu"),
)
def build(given: list[Layer], dry_run: DryRun = False, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Build an engine from a checkpoint."""
    from trtllm_redrafter.backends import load_backend
    from trtllm_redrafter.run.options import build_options, with_checkpoint_limits

    resolved = with_checkpoint_limits(resolve(given))
    options = build_options(resolved, overwrite=overwrite)
    chosen = load_backend(options.backend)
    plan = chosen.plan(options)
    if dry_run:
        sections = ("", "build", *(["tensorrt_llm"] if options.tensorrt_llm is not None else []))
        say(resolved.render(*sections) + "\n\n" + plan.render())
    else:
        with progress_bar() as progress:
            chosen.build(plan, progress)
        say(f"engine written to {options.output}")
    slow = plan.as_dict().get("executor_note")
    if slow is not None:
        note(f"note: {slow}")
    if as_json:
        emit("build", output=options.output, dry_run=dry_run, values=resolved.as_dict(), plan=plan.as_dict())
