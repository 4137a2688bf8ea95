"""How long operations report their progress, without knowing how it is shown.

They call `progress("convert", done, total, "bytes")`; the CLI draws a bar, tests collect the calls, and the default
does nothing.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the stage's name, how much is done, how much there is (None: unknown), and the unit."""

    def __call__(self, stage: str, done: int, total: int | None, unit: str) -> None: ...


def no_progress(stage: str, done: int, total: int | None, unit: str) -> None:
    """Do nothing."""
