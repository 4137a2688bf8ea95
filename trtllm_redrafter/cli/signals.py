"""Ctrl-C and the signals that end a job stop the program in one way: clean up, say so, exit with 128 + the number.

Left alone, SIGTERM and SIGHUP would end the process between two writes, without the clean-up an exception causes. The
signal is remembered too: raised inside the import of a library, KeyboardInterrupt can come out as another exception.
"""

from __future__ import annotations

import signal
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[int] = []


def listen() -> None:
    """Turn the ending signals into KeyboardInterrupt; those the parent chose to ignore (nohup) stay ignored."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def exit_code() -> int | None:
    """128 + the first signal that came; None when none did."""
    return 128 + _received[0] if _received else None
