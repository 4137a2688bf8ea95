"""`doctor`: can this machine do it, and if not, what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit, say
from trtllm_redrafter.cli.options import Changes, Json
from trtllm_redrafter.errors import BackendError


def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="Also check what this recipe needs.")] = None,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Check versions, GPU, driver, MPI, disk and memory; exit code 6 when the backend asked for cannot be used."""
    from trtllm_redrafter.doctor import examine
    from trtllm_redrafter.run.hardware_plan import machine_needs
    from trtllm_redrafter.settings import file_layers, resolve, set_layer

    layers = [*(file_layers(recipe) if recipe is not None else []), *([set_layer(changes)] if changes else [])]
    resolved = resolve(layers)
    needs = None if recipe is None else machine_needs(resolved, name=recipe.stem)
    report = examine(needs)
    say(report.render())
    able = report.serves(resolved.recipe.backend)
    if as_json:
        emit("doctor", backend=resolved.recipe.backend, able=able, **report.as_dict())
    if not able:
        raise typer.Exit(BackendError.exit_code)
