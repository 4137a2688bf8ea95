"""`verify`: is a checkpoint or engine whole, and the same as the model it was made from?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_redrafter.cli.console import emit, note, progress_bar, say
from trtllm_redrafter.cli.options import Json
from trtllm_redrafter.errors import VerificationError


def verify(
    path: Annotated[Path, typer.Argument(help="Checkpoint or engine directory.")],
    against: Annotated[
        Path | None, typer.Option("--against", help="Hugging Face directory to compare values and greedy tokens with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check hashes, names, shapes and dtypes; with --against, values and greedy tokens too."""
    from trtllm_redrafter.convert.against import verify as run_checks

    with progress_bar() as progress:
        report = run_checks(path, against=against, hashes=True, progress=progress)
    if report.ok:
        say(report.render())
    else:
        note(report.render())
    if as_json:
        emit("verify", **report.as_dict())
    if not report.ok:
        raise typer.Exit(VerificationError.exit_code)
