"""The only place that prints: results on stdout, everything about them (progress, warnings, errors) on stderr.

With `--json` the last line of stdout is one JSON document, of a success or of an error alike:

    {"command": "build", "ok": true, "output": "engine", ...}
    {"command": "build", "ok": false, "error": {"kind": "input", "what": "...", ...}}
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import typer

from trtllm_redrafter.cli import signals
from trtllm_redrafter.errors import RedrafterError
from trtllm_redrafter.fsio import human_bytes
from trtllm_redrafter.progress import Progress, no_progress
from trtllm_redrafter.prompts.jsonl import OBEYED, dump_line

INTERNAL_ERROR, INTERRUPTED = 70, 130

_UNSAFE = re.compile(f"[\x00-\x08\x0b-\x1f{OBEYED}]")
"""Control characters except line feed and tab, direction marks, lone surrogates."""


def printable(text: str) -> str:
    """Untrusted text made safe for a terminal: line breaks and tabs stay, other control characters become escapes.

    Ids, paths, templates, models and their texts can contain escape sequences that move the cursor, rename the window
    or reverse the reading direction. Bytes of arguments that are not UTF-8 are shown as `\\xNN`.
    """
    return _UNSAFE.sub(_shown, text.replace("\r\n", "\n"))


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a path or argument
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def say(text: str = "") -> None:
    """A result for people."""
    typer.echo(printable(text))


def say_generated(text: str, *, end: bool = True) -> None:
    """Generated text: escaped on a terminal, unchanged in files and pipes."""
    shown = printable(text) if sys.stdout.isatty() else text
    typer.echo(shown, nl=end, color=True)  # else it takes out what looks like colours


def note(text: str) -> None:
    """A remark on stderr; if it cannot be written, the command continues."""
    with suppress(OSError):
        typer.echo(printable(text), err=True)


class _Notes(logging.Handler):
    """Warnings of the package, as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{record.levelname.lower()}: {record.getMessage()}")


def show_warnings() -> None:
    """Show the package's log warnings as notes. Idempotent."""
    log = logging.getLogger("trtllm_redrafter")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes(logging.WARNING))


def accept_all_text() -> None:
    """Characters that the terminal's encoding lacks are escaped, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def emit(command: str, **values: Any) -> None:
    """The JSON document of a completed command: a success, unless `values` have `ok=False` and the error."""
    _document({"command": command, "ok": True, **values})


def _document(values: Mapping[str, Any]) -> None:
    typer.echo(dump_line(values))


def _emit_failure(command: str, error: Mapping[str, Any]) -> None:
    """The JSON document of an error; if it cannot be written, there is still the exit code."""
    with suppress(OSError):
        _document({"command": command, "ok": False, "error": error})


def report_error(command: str, error: RedrafterError, *, as_json: bool, debug: bool) -> int:
    """Render one of our errors; returns the exit code."""
    if debug:
        _show_trace(error)
    style: dict[str, Any] = {} if os.environ.get("NO_COLOR") else {"fg": "red", "bold": True}
    with suppress(OSError):
        typer.secho("error: ", err=True, nl=False, **style)
    note(error.render())
    if as_json:
        _emit_failure(command, error.as_dict())
    return error.exit_code


def report_crash(command: str, error: BaseException, *, as_json: bool, debug: bool) -> int:
    """An unexpected error, most likely a bug in this program."""
    what = f"{type(error).__name__}: {error}"
    if debug:
        _show_trace(error)
    else:
        note(f"internal error: {what}\n  remedy: run again with --debug, and report the traceback it shows")
    if as_json:
        _emit_failure(command, {"kind": "internal", "exit_code": INTERNAL_ERROR, "what": what})
    return INTERNAL_ERROR


def _show_trace(error: BaseException) -> None:
    note("".join(traceback.format_exception(error)).rstrip("\n"))


def report_interrupt(command: str, *, as_json: bool) -> int:
    """Stopped by the user or the job scheduler."""
    code = signals.exit_code() or INTERRUPTED
    note("interrupted")
    if as_json:
        _emit_failure(command, {"kind": "interrupted", "exit_code": code, "what": "interrupted"})
    return code


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Bars on stderr, one per stage, that vanish when done; none where stderr is a file or a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    console = Console(stderr=True)
    if not console.is_terminal:
        yield no_progress
        return
    bars = Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int | None, unit: str) -> None:
        amount = f"{_amount(done, unit)} of {_amount(total, unit)}" if total else _amount(done, unit)
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, amount=amount)
        bars.update(tasks[stage], completed=done, total=total, amount=amount)

    with bars:
        yield report


def _amount(count: int, unit: str) -> str:
    return human_bytes(count) if unit == "bytes" else f"{count} {unit}"


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr for work that cannot say how far it is."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
