"""`inspect`: what a directory or safetensors file is, its tensors, and where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit, say
from trtllm_redrafter.cli.options import Json


def inspect(
    path: Annotated[Path, typer.Argument(help="Base model, drafter, checkpoint, engine or .safetensors file.")],
    as_json: Json = False,
) -> None:
    """Say what PATH is: settings, table of tensors, provenance. Reads headers only."""
    from trtllm_redrafter.verify.inspect import inspect as look_at

    found = look_at(path)
    say(found.render())
    if as_json:
        emit("inspect", **found.as_dict())
