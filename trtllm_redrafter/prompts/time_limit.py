"""Stop Python code that runs too long, in whatever thread it runs.

A signal would reach the main thread alone, and a trace function would slow every line down. So a timer raises an
exception in the thread itself, at its next bytecode instruction; a single long call into C is not interrupted, which
is why `chat_template` bounds what such calls are given.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc


class TimeExpired(BaseException):
    """Raised in the limited code. No `Exception`: code that catches those must not go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """`TimeExpired` when the block has not ended after `seconds`."""
    lock, thread, over = threading.Lock(), threading.get_ident(), False

    def expire() -> None:
        with lock:
            if not over:
                _raise_in_thread(ctypes.c_ulong(thread), ctypes.py_object(TimeExpired))

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            over = True
            _raise_in_thread(ctypes.c_ulong(thread), None)  # takes back one that has not been raised yet
