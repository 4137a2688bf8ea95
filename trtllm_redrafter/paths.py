"""What may be read and where may be written, decided before the work: regular files, usable names, space.

A checkpoint's `config.json` that is a pipe would block forever, reading a device may have side effects, and
a full or read-only disk is best noticed before an hour of work:

    with open_regular(path) as file: ...         # InputError for directories, pipes, sockets, devices
    check_place(output, needed_bytes=10**9)      # OutputError: read-only, no permission, too little space
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trtllm_redrafter.errors import InputError, OutputError

MAX_NAME_BYTES = 255
"""The longest name of a file or directory on Linux's file systems."""

MAX_PATH_BYTES = 4095

_KINDS = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
)


OUTPUT_ERRORS: Mapping[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "free some space or choose an --output on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another --output"),
    errno.EFBIG: ("a file is larger than the file system or the limit allows", "choose another --output"),
    errno.EROFS: ("the file system is read-only", "choose another --output"),
    errno.EACCES: ("no permission to write here", "choose another --output or change its owner"),
    errno.EPERM: ("no permission to write here", "choose another --output or change its owner"),
    errno.ENOTDIR: ("a parent of the output is a file", "choose another --output"),
    errno.EEXIST: ("a file is where a directory of the output should be", "choose another --output"),
    errno.EISDIR: ("the output is a directory, a file is to be written", "choose another --output"),
    errno.ENAMETOOLONG: ("the name of the output is too long", "choose a shorter --output"),
    errno.ELOOP: ("a symbolic link of the output's path leads to itself", "choose another --output"),
}
"""What and remedy, by the operating system's error number."""


def output_error(code: int, where: Path, why: str | None) -> OutputError:
    """The error for an output that fails, or would fail, with error number `code` of `OUTPUT_ERRORS`."""
    what, remedy = OUTPUT_ERRORS[code]
    return OutputError(what, where=where, why=why, remedy=remedy)


def text_problem(path: Path | str) -> str | None:
    """Why a path cannot be written down, in JSON and for the libraries that take it; None when it can."""
    text = str(path)
    if "\0" in text:
        return "a path cannot contain a zero byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "the path is not UTF-8, as JSON and the tokenizer library need it; rename it, or use a symbolic link"
    return None


def name_problem(path: Path | str) -> str | None:
    """Why no file can have this path; None when it is fine."""
    text = str(path)
    problem = text_problem(text)
    if problem is not None:
        return problem
    if len(os.fsencode(text)) > MAX_PATH_BYTES:
        return f"the path is longer than {MAX_PATH_BYTES} bytes"
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(text).parts):
        return f"a name in the path is longer than {MAX_NAME_BYTES} bytes"
    return None


def check_regular(path: Path) -> os.stat_result:
    """The file's status; `InputError` when it is missing, cannot be reached or is no regular file."""
    problem = name_problem(path)
    if problem is not None:
        raise InputError("the path cannot be used", where=path, why=problem, remedy="check the path")
    try:
        status = path.stat()
    except OSError as e:
        raise InputError("cannot read the file", where=path, why=e.strerror, remedy="check the path") from e
    _refuse_irregular(status, path)
    return status


def _refuse_irregular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "special file")
    raise InputError(
        f"this is a {kind}, not a regular file", where=path,
        why="its size is not known, and it can be read once only" if kind in ("pipe", "socket") else None,
        remedy="name a file on a disk",
    )  # fmt: skip


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A file opened for reading; `InputError` when it cannot be read or is no regular file. Never blocks.

    Reading inside the block may still fail: an `OSError` there becomes an `InputError` too.
    """
    check_regular(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as raw:
            _refuse_irregular(os.fstat(raw.fileno()), path)  # it may have been exchanged in between
            yield raw
    except OSError as e:
        raise InputError("cannot read the file", where=path, why=e.strerror, remedy="check the path") from e


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The whole content of a regular file of at most `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            why = f"it has {size:,} bytes, at most {max_bytes:,} are read"
            raise InputError("the file is too large", where=path, why=why, remedy="check that it is the right file")
        parts = []
        while part := file.read(2**20):
            parts.append(part)
    return b"".join(parts)


def existing_parent(output: Path) -> Path:
    """The nearest directory above `output` that exists: on whose disk, and with whose permissions, it will be."""
    place = Path(os.path.realpath(output)).parent
    while not place.exists():
        place = place.parent
    return place


def check_place(output: Path, needed_bytes: int = 0) -> None:
    """`OutputError` when `output` cannot be written: its name, a read-only place, no permission, too little space.

    Creates nothing. What is not known before (a quota, another program that fills the disk) still fails while writing.
    """
    if (problem := text_problem(output)) is not None:
        what = "the output cannot have this name"
        raise OutputError(what, where=output, why=problem, remedy="choose another --output")
    if (problem := name_problem(output)) is not None:
        raise output_error(errno.ENAMETOOLONG, output, problem)
    try:
        place = existing_parent(output)
        usable = os.access(place, os.W_OK | os.X_OK) if place.is_dir() else None
        read_only = bool(os.statvfs(place).f_flag & os.ST_RDONLY)
        free = shutil.disk_usage(place).free
    except OSError as e:
        why, remedy = e.strerror, "choose another --output"
        raise OutputError("the output's place cannot be reached", where=output, why=why, remedy=remedy) from e
    for code, fails in ((errno.EEXIST, usable is None), (errno.EROFS, read_only), (errno.EACCES, not usable)):
        if fails:
            raise output_error(code, output, str(place))
    if needed_bytes > free:
        raise OutputError(
            "there is not enough disk space for the output",
            where=output,
            why=f"{needed_bytes:,} bytes are needed, {free:,} are free",
            remedy="free some space or choose an --output on another disk",
        )


def explain_os_error(error: OSError) -> InputError | OutputError | None:
    """A message for an operating system error that nothing else has handled; None if it names no file."""
    if error.filename is None or error.errno is None:
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, (bytes, str)) else str(error.filename)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        remedy = "free some space or choose a place on another disk"
        return OutputError("the file cannot be written", where=where, why=error.strerror, remedy=remedy)
    return InputError("the path cannot be used", where=where, why=error.strerror, remedy="check the path")


@contextmanager
def as_input_error() -> Iterator[None]:
    """Turn operating system errors about a path into an `InputError`."""
    try:
        yield
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        raise explained from error
