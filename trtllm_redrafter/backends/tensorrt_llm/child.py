"""Run a program in a child process: its output goes to a file and to a listener, and it never outlives this process.

The child leads its own process group: an interrupt ends it and everything it spawned (one process per rank), first with
SIGTERM, then with SIGKILL.

    code = run_logged(["trtllm-build", ...], log=Path("build.log"), on_line=print, on_tick=lambda s: None)
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from trtllm_redrafter.errors import BackendError

GRACE_SECONDS = 10.0
_TICK_SECONDS = 1.0
_SILENT_TICKS = 3
"""How long to wait for output after the child has exited: a process it left behind may keep the pipe open."""


def run_logged(
    command: Sequence[str],
    *,
    log: Path,
    on_line: Callable[[str], None],
    on_tick: Callable[[float], None],
) -> int:
    """Exit code of the child (negative: killed by that signal). `on_tick` gets the elapsed seconds each second."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8", errors="replace") as file:
        child = start_child(command)
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        assert child.stdout is not None
        reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
        reader.start()
        try:
            _follow(child, lines, file, start, on_line, on_tick)
            return child.wait()
        finally:
            end_group(child)
            reader.join(GRACE_SECONDS)
            if not reader.is_alive():  # closing would wait for what still holds the pipe
                child.stdout.close()


def start_child(command: Sequence[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        remedy = "run `trtllm-redrafter doctor`; it says what this machine lacks"
        raise BackendError(f"cannot start {command[0]}", why=str(error), remedy=remedy) from error


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _follow(
    child: subprocess.Popen[str],
    lines: queue.SimpleQueue[str | None],
    file: IO[str],
    start: float,
    on_line: Callable[[str], None],
    on_tick: Callable[[float], None],
) -> None:
    """Until the child closes its output, or has ended and nothing more comes."""
    silent = 0
    while silent < _SILENT_TICKS:
        on_tick(time.monotonic() - start)
        try:
            line = lines.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            silent += child.poll() is not None
            continue
        if line is None:
            return
        file.write(line)
        file.flush()
        on_line(line.rstrip("\n"))


def end_group(child: subprocess.Popen[str], grace: float = GRACE_SECONDS) -> None:
    """Make sure that the child and its own children are gone, even when a second Ctrl-C interrupts the wait."""
    try:
        _signal_group(child, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    finally:
        _signal_group(child, signal.SIGKILL)
        child.wait()


def _signal_group(child: subprocess.Popen[str], number: int) -> None:
    """The group exists as long as any member does, so this reaches orphans of a dead leader too."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
