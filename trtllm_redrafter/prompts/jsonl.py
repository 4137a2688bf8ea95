"""Reading and writing JSON Lines, for all commands.

Lines end at a line feed only: U+2028, U+0085 and form feeds can be part of a string, which `str.splitlines` would
split. A byte order mark and carriage returns before the line feed are not part of a line. Lines are read once and as
they arrive, so that pipes, `/dev/stdin` and process substitution work, and an error is reported for its line alone.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from trtllm_redrafter.errors import InputError, Problem, raise_together
from trtllm_redrafter.fsio import without_nan

MAX_LINE_BYTES = 64 * 2**20
"""Far beyond any prompt; a file without a line feed for that long is not JSON Lines."""

MAX_STREAM_BYTES = 4 * 2**30
"""Limit for pipes and terminals, which unlike files may never end."""

WRITER_SECONDS = 10.0
"""How long a named pipe may have no writer."""

SHOWN = 20
"""Number of a file's problems that a message lists."""

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_REMEDY = "write one JSON object per line, in UTF-8"
OBEYED = "\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
"""For a regular expression's class: characters besides ASCII's controls that are never written as they are (DEL, C1,
marks of writing direction, halves of surrogate pairs)."""

_ESCAPED = re.compile(f"[{OBEYED}\u2028\u2029]")


NumberedLine = tuple[int, dict[str, Any] | InputError]
"""Number of a line that is not blank, counted from 1, and its object, or the error if it is none."""


def check_source(path: Path) -> None:
    """`InputError` if lines cannot be read from `path`. Opens nothing, so that no data of a pipe is lost."""
    try:
        mode = path.stat().st_mode
    except OSError as e:
        missing = isinstance(e, FileNotFoundError)
        what = "the file does not exist" if missing else "cannot read the file"
        raise InputError(what, where=path, why=None if missing else str(e), remedy="check the path") from e
    if stat.S_ISDIR(mode):
        raise InputError("this is a directory, not a file", where=path, remedy="name a JSON Lines file")
    if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not _ends(path)):
        why = "a device has no lines, and may never end"
        raise InputError("this is a device, not a file", where=path, why=why, remedy="name a JSON Lines file")


def _ends(device: Path) -> bool:
    """Is this character device a terminal, where the user can end the input, or the null device?"""
    if os.path.realpath(device) == os.path.realpath(os.devnull):
        return True
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.isatty(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[NumberedLine]:
    """Lines of a file or stream, read lazily; `InputError` if it cannot be read at all."""
    check_source(path)
    try:
        with _opened(path) as file:
            yield from lines_of(file, path, endless=not stat.S_ISREG(os.fstat(file.fileno()).st_mode))
    except OSError as e:
        raise InputError("cannot read the file", where=path, why=str(e), remedy="check the path") from e


def _opened(path: Path) -> IO[bytes]:
    """The file, for reading. A named pipe opens only once there is a writer; the wait for one is limited."""
    if not stat.S_ISFIFO(path.stat().st_mode):
        return path.open("rb")
    found: Queue[int | OSError] = Queue()

    def wait_for_writer() -> None:
        try:
            found.put(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            found.put(error)

    threading.Thread(target=wait_for_writer, daemon=True).start()
    try:
        opened = found.get(timeout=WRITER_SECONDS)
    except Empty:
        with suppress(OSError):  # let the thread end
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
            late = found.get()
            if isinstance(late, int):
                os.close(late)
        why = f"none came within {WRITER_SECONDS:.0f} seconds"
        raise InputError(
            "nobody writes into the pipe", where=path, why=why, remedy="start what writes into it first, or name a file"
        ) from None
    if isinstance(opened, OSError):
        raise opened
    return os.fdopen(opened, "rb")


def lines_of(file: IO[bytes], where: Path | str, *, endless: bool = False) -> Iterator[NumberedLine]:
    """Lines of an open file. `endless`: a stream, which is read up to `MAX_STREAM_BYTES`."""
    number = size = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        size += len(line)
        if number == 1 and line.startswith(_UTF16):
            raise InputError("the file is in UTF-16", where=where, remedy="save it in UTF-8")
        if number == 1:
            line = line.removeprefix(_BOM)
        whole = True
        while len(line) >= MAX_LINE_BYTES and not line.endswith(b"\n"):
            whole = False
            line = file.readline(MAX_LINE_BYTES)
            size += len(line)
            _check_size(size, where, endless)
        _check_size(size, where, endless)
        if not whole:
            what = f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB"
            yield number, InputError(what, remedy=_REMEDY)
        elif line.strip():
            yield number, _object(line)


def _check_size(size: int, where: Path | str, endless: bool) -> None:
    if endless and size > MAX_STREAM_BYTES:
        what = f"more than {MAX_STREAM_BYTES // 2**30} GiB came from a stream"
        raise InputError(what, where=where, remedy="write it to a file, and pass that")


def _object(line: bytes) -> dict[str, Any] | InputError:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        why = f"byte {e.start + 1} is 0x{line[e.start]:02x}"
        return InputError("the line is not UTF-8", why=why, remedy=_REMEDY)
    except json.JSONDecodeError as e:
        why = f"{e.msg}, at character {e.colno}"
        return InputError("the line is not JSON", why=why, remedy=_REMEDY)
    except (ValueError, RecursionError) as e:  # numbers of thousands of digits; deep nesting
        why = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        return InputError("the line cannot be read", why=why, remedy=_REMEDY)
    if not isinstance(values, dict):
        return InputError("the line is not a JSON object", remedy='write {"prompt": "…"}')
    return values


def raise_problems(problems: list[Problem], what: str, *, where: Path | str, remedy: str | None = None) -> None:
    """Raise `InputError` with the first `SHOWN` of a file's problems and the number of further ones."""
    if len(problems) == 1 and problems[0].where is not None:
        problems = [replace(problems[0], where=f"{where}, {problems[0].where}")]
    more = len(problems) - SHOWN
    shown = [*problems[:SHOWN], Problem(f"and {more} more lines like these")] if more > 0 else problems
    raise_together(InputError, shown, what, where=where, remedy=remedy)


def dump_line(value: Any) -> str:
    """One line of readable JSON that no reader splits and that contains no terminal control characters.

    Escapes what `json` does not: non-ASCII line separators, control characters (C1, direction marks), and lone
    surrogates, which represent bytes of file names that are not UTF-8. NaN and infinity become null.
    """
    text = json.dumps(without_nan(value), ensure_ascii=False, default=str)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
