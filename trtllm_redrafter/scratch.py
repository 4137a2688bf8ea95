"""Temporary files and directories that are cleaned up even if their process was killed.

Each has its creator in its name, and is locked (flock) for as long as it is in use:

    .checkpoint.partial-host-1234-9f3a01bc     an output being written, or one being removed
    .redrafter-engine-host-1234-9f3a01bc       a temporary engine

A lock is released when its process ends, so what is not locked is abandoned; the next one made under the same stem
removes it. What belongs to another user, another host or is a symbolic link is never touched.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_PATTERN = r"{stem}-{host}-(?P<pid>[0-9]{{1,10}})-[0-9a-f]{{8}}"


def own_name(stem: str) -> str:
    """`.checkpoint.partial` → `.checkpoint.partial-host-1234-9f3a01bc`."""
    return f"{stem}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def partial_stem(target: Path) -> str:
    """The stem for a `target` that is being written or removed."""
    return f".{target.name}.partial"


@contextmanager
def new_directory(parent: Path, stem: str, *, mode: int = 0o777) -> Iterator[Path]:
    """A new, locked directory in `parent`. Removed with the block, if it is still there; older leftovers are too."""
    sweep(parent, stem)
    path = parent / own_name(stem)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        path.mkdir(mode)
        while not stack.enter_context(claimed(path, new=True)):  # another process swept it before it was locked
            path.mkdir(mode, exist_ok=True)
        yield path


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """A new, empty file that takes `target`'s place when the block ends without an exception."""
    target = Path(os.path.realpath(target))
    sweep(target.parent, partial_stem(target))
    path = target.with_name(own_name(partial_stem(target)))
    try:
        path.touch(exist_ok=False)
        with claimed(path, new=True):
            yield path
            path.replace(target)
    finally:
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory, after renaming it, so that it is never seen half removed. No error if it is missing."""
    with suppress(FileNotFoundError):
        gone = path.with_name(own_name(partial_stem(path)))
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    sweep(path.parent, partial_stem(path))


def sweep(parent: Path, stem: str) -> None:
    """Remove what killed processes of this user on this host left in `parent` under `stem`."""
    for left in leftovers(parent, stem):
        with claimed(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def leftovers(parent: Path, stem: str) -> list[Path]:
    """Files and directories of this user in `parent` with a name made by `own_name(stem)` on this host."""
    pattern = re.compile(_PATTERN.format(stem=re.escape(stem), host=re.escape(_host())))
    try:
        found = [entry for entry in os.scandir(parent) if pattern.fullmatch(entry.name)]
        return sorted(parent / entry.name for entry in found if _is_ours(entry.stat(follow_symlinks=False)))
    except OSError:  # missing or unreadable: nothing of this program is in it
        return []


@contextmanager
def claimed(path: Path, *, new: bool = False) -> Iterator[bool]:
    """Hold the lock of a temporary file or directory; False if another process does, or if it is gone.

    Where the file system has no locks, its process number decides; a `new` one is this process's own.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        yield _lock(fd, path, new)
    finally:
        os.close(fd)


def _lock(fd: int, path: Path, new: bool) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # NFS, for a directory
        return new or not _is_alive(int(path.name.split("-")[-2]))
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except OSError:
        return False


def _is_ours(found: os.stat_result) -> bool:
    kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return kind and found.st_uid == os.geteuid()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())
