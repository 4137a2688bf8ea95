"""`convert`: base model + drafter → TensorRT-LLM checkpoint."""

from __future__ import annotations

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import DryRun, Json, Overwrite, flag, flags, with_settings
from trtllm_redrafter.settings import Layer, resolve


@with_settings(
    flag("base", required=True),
    flag("drafter"),
    flag("checkpoint", "--output", required=True),
    *flags("convert", greedy="--greedy/--sampling"),
)
def convert(given: list[Layer], dry_run: DryRun = False, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Convert a Hugging Face base model and a ReDrafter drafter into a TensorRT-LLM checkpoint."""
    from trtllm_redrafter.conversion.plan import plan_conversion
    from trtllm_redrafter.conversion.writer import convert as run_conversion
    from trtllm_redrafter.run.options import convert_options

    resolved = resolve(given)
    plan = plan_conversion(convert_options(resolved, overwrite=overwrite))
    if dry_run:
        say(resolved.render("", "convert") + "\n\n" + plan.render())
    else:
        for line in plan.notes:
            note(f"note: {line}")
        with progress_bar() as progress:
            run_conversion(plan, progress)
        say(f"checkpoint written to {plan.options.output}")
    if as_json:
        emit("convert", output=plan.options.output, dry_run=dry_run, values=resolved.as_dict(), plan=plan.as_dict())
