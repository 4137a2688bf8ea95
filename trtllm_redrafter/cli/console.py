"""The only place that prints: results on stdout, everything about them (progress, warnings, errors) on stderr.

With `--json` the last line of stdout is one JSON document, of a success or of an error alike:

    {"command": "build", "ok": true, "output": "engine", ...}
    {"command": "build", "ok": false, "error": {"kind": "input", "what": "...", ...}}
"""

from __future__ import annotations

import json
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
from trtllm_redrafter.progress import Progress, no_progress

INTERNAL_ERROR, INTERRUPTED = 70, 130


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey instead of show (escape sequences, reversed writing), and what no encoding can write."""


def printable(text: str) -> str:
    """Text with control characters as escapes: names, ids and answers of models come from files, not from the user."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str = "", *, nl: bool = True) -> None:
    """A result for people; as it is into a file or pipe, without control characters to a terminal."""
    typer.echo(printable(text) if sys.stdout.isatty() else _encodable(text), nl=nl)


def note(text: str) -> None:
    """Something about the result, on stderr; where nobody can read it, the work goes on."""
    with suppress(OSError):
        typer.echo(printable(text), err=True)


def _encodable(text: str) -> str:
    """Lone surrogates (names that are not UTF-8) as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def emit(command: str, **values: Any) -> None:
    """The JSON document of what ran to its end: a success, unless `values` say `ok=False` and give the error."""
    say(_document({"command": command, "ok": True, **values}))


def _document(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False, default=str)
    return text if _encodable(text) == text else json.dumps(values, default=str)


def _emit_failure(command: str, error: Mapping[str, Any]) -> None:
    """The JSON document of an error; where it cannot be written, the exit code has to do."""
    with suppress(OSError):
        say(_document({"command": command, "ok": False, "error": error}))


def report_error(command: str, error: RedrafterError, *, as_json: bool, debug: bool) -> int:
    """Render one of our errors; returns the exit code."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    style: dict[str, Any] = {} if os.environ.get("NO_COLOR") else {"fg": "red", "bold": True}
    with suppress(OSError):
        typer.secho("error: ", err=True, nl=False, **style)
    note(error.render())
    if as_json:
        _emit_failure(command, error.as_dict())
    return error.exit_code


def report_crash(command: str, error: BaseException, *, as_json: bool, debug: bool) -> int:
    """An error nobody foresaw: our bug, most likely."""
    what = f"{type(error).__name__}: {error}"
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    else:
        note(f"internal error: {what}\n  remedy: run again with --debug, and report the traceback it shows")
    if as_json:
        _emit_failure(command, {"kind": "internal", "exit_code": INTERNAL_ERROR, "what": what})
    return INTERNAL_ERROR


def report_interrupt(command: str, *, as_json: bool) -> int:
    """The user, or whoever runs the job, has stopped it."""
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
    return f"{count / 1e6:.1f} MB" if unit == "bytes" else f"{count} {unit}"


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
