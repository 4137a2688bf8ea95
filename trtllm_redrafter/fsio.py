"""Files and directories: atomic outputs, hashes, JSON, paths that stay inside their directory.

Every artefact of this package (checkpoint, engine, drafter, report) is a directory. A half-written one looks
like a whole one to the next tool, so writers fill a sibling directory and rename it at the end:

    with atomic_directory(Path("checkpoint"), overwrite=False) as work:
        write_json(work / "config.json", config)
    # here, and not before, "checkpoint" exists

Data is not flushed to the disk before the rename: after a power failure, `verify` compares the manifest's hashes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import InputError, OutputError
from trtllm_redrafter.paths import OUTPUT_ERRORS, check_place, open_regular, output_error, read_regular
from trtllm_redrafter.scratch import claimed, leftovers, new_directory, own_name, partial_stem, replaced_file, sweep

CREATOR = "trtllm-redrafter"
"""The creator's name in every manifest; what marks a directory as ours to replace."""

_MAX_JSON_BYTES = 512 * 2**20

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


@contextmanager
def atomic_directory(
    path: Path, *, overwrite: bool, on_complete: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """A new sibling directory that takes `path`'s place when the block ends without an exception.

    An existing `path` needs `overwrite`, and is replaced only when it is empty or holds a manifest of this program: a
    mistyped `--output ~` must not delete a home directory. It stays untouched until the new one is complete.
    `on_complete` is called with the complete directory before it takes its place: what it records is there first.
    """
    target = Path(os.path.realpath(path))
    restore(target)
    check_replaceable(target, overwrite=overwrite)
    with made_parents(target), as_output_error(target), new_directory(target.parent, partial_stem(target)) as work:
        yield work
        if on_complete is not None:
            on_complete(work)
        _put_in_place(work, target, overwrite=overwrite)


@contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """The directories above `path`, made where they are missing; those that stay empty are removed again."""
    parents = [parent for parent in path.parents if not parent.exists()]
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty: the output is there, or somebody else's
            for parent in parents:
                parent.rmdir()


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` when `path` exists and may not be replaced, or when nothing can be written there."""
    check_place(path)
    target = Path(os.path.realpath(path))
    with as_output_error(path):
        exists = target.exists()
    if not exists:
        return
    if not overwrite:
        raise OutputError(
            "the output exists already", where=path, remedy="pass --overwrite to replace it, or another --output"
        )
    if not target.is_dir():
        raise OutputError("the output is a file, not a directory", where=path, remedy="pass another --output")
    if any(target.iterdir()) and not is_ours(target):
        raise OutputError(
            "the output directory was not written by this program",
            where=path,
            why="it holds files but no manifest.json of this program, and --overwrite would delete all of them",
            remedy="pass another --output, or remove the directory yourself",
        )


def overlaps(output: Path, source: Path) -> bool:
    """Is one the other, or inside it? Replacing such an output would delete what it is made from."""
    a, b = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    return a.is_relative_to(b) or b.is_relative_to(a)


def is_ours(directory: Path) -> bool:
    """Does the directory carry a manifest this package wrote?"""
    try:
        creator = read_json(directory / "manifest.json").get("creator")
    except InputError:
        return False
    return isinstance(creator, dict) and creator.get("name") == CREATOR


@contextmanager
def as_output_error(where: Path) -> Iterator[None]:
    """Turn the operating system's errors about writing into an `OutputError` with a remedy."""
    try:
        yield
    except OSError as e:
        if e.errno is None or e.errno not in OUTPUT_ERRORS:
            raise
        raise output_error(e.errno, where, str(e)) from e


def _put_in_place(work: Path, target: Path, *, overwrite: bool) -> None:
    """Give `work` the name `target`; an old `target` gets the name of `work`, and goes with it."""
    if not target.exists():
        work.rename(target)
        return
    check_replaceable(target, overwrite=overwrite)  # someone may have put it there in the meantime
    if _exchange(work, target):
        return
    aside = target.with_name(own_name(_old_stem(target)))
    with claimed(target, new=True):  # so that no other process takes it for abandoned
        target.rename(aside)
        try:
            work.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories' names in one step; False where the system cannot."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _old_stem(target: Path) -> str:
    return f".{target.name}.old"


def restore(path: Path) -> None:
    """Put back an output that a killed run of this user on this host had moved aside, and remove what else it left."""
    target = Path(os.path.realpath(path))
    for left in leftovers(target.parent, _old_stem(target)):
        with claimed(left) as free:
            if free and not target.exists() and is_ours(left):
                left.rename(target)
            elif free:
                shutil.rmtree(left, ignore_errors=True)
    sweep(target.parent, partial_stem(target))


def sha256_file(path: Path, chunk_bytes: int = 2**20) -> str:
    """Hex SHA-256 of a file, read in chunks that stay in the CPU's cache."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(chunk_bytes))
    with open_regular(path) as file:
        while n := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:n])
    return digest.hexdigest()


def sample_sha256(path: Path, pages: int = 16, page_bytes: int = 4096) -> str:
    """Hex SHA-256 of evenly spaced pages of a file; of the whole file if that is less."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= pages * page_bytes:
            pages, page_bytes = 1, size
        for page in range(pages):
            file.seek(page * (size - page_bytes) // max(pages - 1, 1))
            digest.update(file.read(page_bytes))
    return digest.hexdigest()


def human_bytes(count: int) -> str:
    """`269.1 MB`; powers of ten, as disks are sold."""
    if count < 1000:
        return f"{count} B"
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"


def safe_join(base: Path, relative: str) -> Path:
    """`base / relative`, refused when it would leave `base` (absolute, `..`, or through a symbolic link).

    Links of a Hugging Face hub cache are followed: there every file of `snapshots/REV` is a link into the
    `blobs` directory beside it.
    """
    path = Path(relative)
    root = Path(os.path.realpath(base))
    inside = bool(relative) and not path.is_absolute() and ".." not in path.parts and "\0" not in relative
    if inside:
        real = Path(os.path.realpath(root / path))
        roots = [root]
        if root.parent.name == "snapshots":
            roots.append(root.parent.parent / "blobs")
        inside = any(real.is_relative_to(r) for r in roots)
    if not inside:
        raise InputError(
            f"the file name {relative!r} leads outside the directory",
            where=base,
            why="only files below it are read",
            remedy="put the file into the directory and name it relative to it",
        )
    return base / path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `InputError` when it is missing, malformed or not an object."""
    try:
        text = read_regular(path, _MAX_JSON_BYTES)
    except InputError as e:
        if not isinstance(e.__cause__, FileNotFoundError):
            raise
        raise InputError("the file is missing", where=path, remedy="check the path, or download it again") from e
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError("the file is not valid JSON", where=path, why=str(e), remedy="download it again") from e
    if not isinstance(value, dict):
        raise InputError(
            "the file does not hold a JSON object", where=path, why=f"it holds a {type(value).__name__}",
            remedy="check that it is the right file",
        )  # fmt: skip
    return value


def without_nan(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity: what could not be computed is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read: indented, with a final newline."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # a path that is not UTF-8 has no other form in JSON than escapes
        data = json.dumps(value, indent=2).encode("ascii")
    path.write_bytes(data + b"\n")


def replace_json(path: Path, value: Any) -> None:
    """`write_json` for a file that others read or a kill may hit: the old content or the new, never a part."""
    with replaced_file(path) as file:
        write_json(file, value)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that is not possible (other disk, no permission, no support)."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        shutil.copyfile(real, target)
