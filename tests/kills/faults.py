"""What happens to a command at its n-th operation on files: a signal, half a write, or a disk that is full.

Python's audit events tell of every opening for writing, renaming, removing, making and locking, whoever asks for it;
`os.write` and `os.pwrite` have none and are replaced. All of it happens in a forked process of the harness.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FULL_DISK = 0
"""In place of a signal's number."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod")


@dataclass(frozen=True)
class Fault:
    """`kind` is a signal's number or FULL_DISK; `torn`: if it is a write, half of it comes first."""

    at: int
    kind: int
    torn: bool

    def __str__(self) -> str:
        name = "ENOSPC" if self.kind == FULL_DISK else signal.Signals(self.kind).name
        return f"{name} at {self.at}{' torn' if self.torn else ''}"


class Hook:
    """Counts operations below `folder` and lets the fault happen at its turn."""

    def __init__(self, folder: Path, fault: Fault | None) -> None:
        self.count = 0
        self._folder, self._fault = str(folder), fault
        self._lock = threading.Lock()
        self._busy = threading.local()

    def install(self) -> None:
        for name in ("write", "pwrite"):
            setattr(os, name, self._wrapped(getattr(os, name)))
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and self._inside(path):
                self._step(None)
        elif event == "fcntl.flock":
            if arguments[1] & fcntl.LOCK_EX:
                self._step(None)
        elif event in _EVENTS and self._inside(arguments[0]):
            self._step(None)

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return path > 2
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        name = os.fsdecode(path)
        return not name.startswith("/") or name.startswith(self._folder)

    def _wrapped(self, real: Callable[..., int]) -> Callable[..., int]:
        def write(fd: int, data: Any, *rest: Any) -> int:
            if fd > 2:
                self._step(lambda: real(fd, bytes(data)[: len(data) // 2], *rest))
            return real(fd, data, *rest)

        return write

    def _step(self, half: Callable[[], int] | None) -> None:
        if getattr(self._busy, "yes", False):
            return
        with self._lock:
            self.count += 1
            now = self._fault is not None and self.count == self._fault.at
        if now:
            self._busy.yes = True
            self._happen(half)
            self._busy.yes = False

    def _happen(self, half: Callable[[], int] | None) -> None:
        assert self._fault is not None
        if self._fault.torn and half is not None:
            half()
        if self._fault.kind == FULL_DISK:
            self._busy.yes = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), self._fault.kind)
