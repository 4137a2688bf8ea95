"""Stop Python code that runs too long, in any thread.

A signal would reach the main thread only, and a trace function would slow down every line. So a watchdog thread raises
an exception in the running one, at its next bytecode instruction. A single long call into C is not interrupted, which
is why `bounded_jinja` limits the input of such calls.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc

_LOOKS_EVERY = 0.05
_IDLE_SECONDS = 1.0


class TimeExpired(BaseException):
    """Raised in the limited code. Not an `Exception`, so that code that catches those does not continue."""


@dataclass
class _Limited:
    """A running block: its thread and its deadline."""

    thread: int
    deadline: float
    expired: bool = False


class _Watch(threading.Thread):
    """Checks the running blocks; ends if there have been none for a while."""

    def __init__(self) -> None:
        super().__init__(name="time-limit", daemon=True)
        self.used = time.monotonic()

    def run(self) -> None:
        global _watch
        while True:
            time.sleep(_LOOKS_EVERY)
            now = time.monotonic()
            with _lock:
                for block in _running:
                    if now > block.deadline and not block.expired:
                        block.expired = True
                        _raise_in_thread(ctypes.c_ulong(block.thread), ctypes.py_object(TimeExpired))
                if not _running and now - self.used > _IDLE_SECONDS:
                    _watch = None
                    return


_lock = threading.Lock()
_running: list[_Limited] = []
_watch: _Watch | None = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeExpired` in the block if it runs longer than `seconds`, within 0.05 s."""
    global _watch
    block = _Limited(threading.get_ident(), time.monotonic() + seconds)
    with _lock:
        _running.append(block)
        if _watch is None or not _watch.is_alive():  # not alive: this process was forked
            _watch = _Watch()
            _watch.start()
        _watch.used = block.deadline - seconds
    try:
        yield
    finally:
        with _lock:
            _running.remove(block)
        # A pending exception is raised here, since the block has taken too long. It is not cancelled: CPython would
        # check for it at every instruction from then on.
        for _ in range(2 if block.expired else 0):
            pass
