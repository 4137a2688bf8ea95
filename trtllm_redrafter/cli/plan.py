"""`plan`: what a recipe needs and costs on a GPU that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit, say
from trtllm_redrafter.cli.options import Json, with_settings
from trtllm_redrafter.settings import Layer, file_layers, resolve


@with_settings()
def plan(
    given: list[Layer],
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, as configs/llama-3.1-8b.yaml.")],
    as_json: Json = False,
) -> None:
    """Show flags, memory and step times of a recipe on its GPU; needs no GPU and no weights."""
    from trtllm_redrafter.run.hardware_plan import plan_recipe

    resolved = resolve([*file_layers(recipe), *given])
    report = plan_recipe(resolved, name=recipe.stem)
    say(report.render())
    if as_json:
        emit("plan", recipe=recipe, **report.as_dict())
