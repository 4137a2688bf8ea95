"""Ctrl-C and the signals that end a job stop the program in one way: clean up, say so, exit with 128 + the number.

Left alone, SIGTERM and SIGHUP would end the process between two writes, without the clean-up an exception causes. The
signal is remembered too: raised inside the import of a library, KeyboardInterrupt can come out as another exception.
"""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

DOUBLED_SECONDS = 1.0
"""A signal this soon after another is the same one: a terminal and a parent process may both pass it on."""

_RETRY_SECONDS = 0.05

_received: list[int] = []
_last = -DOUBLED_SECONDS


def listen() -> None:
    """Turn the ending signals into KeyboardInterrupt; those the parent chose to ignore (nohup) stay ignored."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _unraisable


def rest() -> None:
    """Nothing is left to clean up: from here on a signal ends the process at once, without a message."""
    for number in ENDING:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    global _last
    _received.append(number)
    again, _last = time.monotonic() - _last < DOUBLED_SECONDS, time.monotonic()
    if not again:
        raise KeyboardInterrupt


def _unraisable(what: Any) -> None:
    """An interrupt that came inside a destructor or a callback, where exceptions are dropped, is raised again later."""
    if _received and issubclass(what.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGALRM, _again)
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
    else:
        sys.__unraisablehook__(what)


def _again(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def caused(error: BaseException) -> bool:
    """Was the error raised while an interrupt was being handled?"""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


def forget() -> None:
    """What was received was for a part of the work, which has ended; the program goes on."""
    _received.clear()


def exit_code() -> int | None:
    """128 + the number of the first signal received; None if there was none."""
    return 128 + _received[0] if _received else None
