"""`verify`: is a checkpoint or engine whole, and the same as the model it was made from?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_redrafter.cli.console import emit, note, progress_bar, say, working
from trtllm_redrafter.cli.options import Json
from trtllm_redrafter.errors import VerificationError

if TYPE_CHECKING:
    from trtllm_redrafter.checkpoint.verify import VerifyReport


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
    if against is not None and report.ok:
        report = _with_greedy_tokens(report, path, against)
    if report.ok:
        say(report.render())
    else:
        note(report.render())
    if as_json:
        error = None if report.ok else VerificationError(f"{len(report.problems)} problem(s)", where=path).as_dict()
        emit("verify", **report.as_dict(), error=error)
    if not report.ok:
        raise typer.Exit(VerificationError.exit_code)


def _with_greedy_tokens(report: VerifyReport, path: Path, against: Path) -> VerifyReport:
    """Add what decoding a few prompts shows; only worth it when files and values are right."""
    from trtllm_redrafter.generation.parity import can_compare, greedy_parity

    reason = can_compare(path)
    if reason is not None:
        return replace(report, notes=(*report.notes, reason))
    with working("comparing greedy tokens with transformers"):
        parity = greedy_parity(path, against)
    return replace(report, checks=(*report.checks, parity.render()), problems=(*report.problems, *parity.problems))
