"""One process at a time in a work directory or on an output file.

    with exclusive(work_dir / ".lock", "the work directory", where=work_dir):
        ...

The lock is released when its process ends, however that happens. The file names the holder for others; it is removed
at the end, and means nothing without its lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trtllm_redrafter.errors import OutputError
from trtllm_redrafter.fsio import as_output_error, made_parents

_held: set[tuple[str, int]] = set()
"""Lock file and thread."""


@contextmanager
def exclusive(file: Path, what: str, *, where: Path) -> Iterator[None]:
    """Hold `file`'s lock for the block; `OutputError` that names the other process when one holds it already.

    The thread that holds it may ask for it again. On a file system without locks the block runs unprotected.
    """
    key = (os.path.realpath(file), threading.get_ident())
    if key in _held:
        yield
        return
    with made_parents(file), as_output_error(where):
        fd = _acquire(file, what, where)
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            with suppress(OSError):
                file.unlink()  # while locked: a process that opened it before will check and open it again
            os.close(fd)


def _acquire(file: Path, what: str, where: Path) -> int:
    while True:
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the holder before us has just removed the empty directory
            file.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = _holder(fd)
            os.close(fd)
            raise OutputError(
                f"another process is using {what}", where=where, why=holder,
                remedy="wait for it to end, or use another place",
            ) from e  # fmt: skip
        except OSError:
            return fd
        if _is_still(file, fd):
            with suppress(OSError):  # a full disk: the lock holds without a name too
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(_this_process()).encode(), 0)
            return fd
        os.close(fd)


def _is_still(file: Path, fd: int) -> bool:
    """Is the file still there, not removed between opening and locking?"""
    try:
        return os.path.samestat(os.fstat(fd), file.stat())
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, object]:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": command[:200]}


def _holder(fd: int) -> str:
    try:
        said = json.loads(os.pread(fd, 4096, 0))
        where = "" if said["host"] == socket.gethostname() else f" on {said['host']}"
        return f"process {int(said['pid'])}{where}: {said['command']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "it holds the lock, but has not written its name yet"
