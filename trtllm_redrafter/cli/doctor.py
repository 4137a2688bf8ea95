"""`doctor`: can this machine do it, and if not, what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit, say
from trtllm_redrafter.cli.options import Json, with_settings
from trtllm_redrafter.errors import BackendError
from trtllm_redrafter.settings import Layer, file_layers, resolve


@with_settings()
def doctor(
    given: list[Layer],
    recipe: Annotated[Path | None, typer.Argument(help="Also check what this recipe needs.")] = None,
    as_json: Json = False,
) -> None:
    """Check versions, GPU, driver, MPI, disk and memory; exit code 6 when the backend asked for cannot be used."""
    from trtllm_redrafter.doctor import examine
    from trtllm_redrafter.run.hardware_plan import machine_needs

    resolved = resolve([*(file_layers(recipe) if recipe is not None else []), *given])
    needs = None if recipe is None else machine_needs(resolved, name=recipe.stem)
    report = examine(needs)
    say(report.render())
    able = report.serves(resolved.recipe.backend)
    if as_json:
        emit("doctor", backend=resolved.recipe.backend, able=able, **report.as_dict())
    if not able:
        raise typer.Exit(BackendError.exit_code)
