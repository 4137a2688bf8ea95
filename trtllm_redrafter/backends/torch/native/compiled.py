"""The compiled kernels on disk: where they lie, whether they can be trusted, and how they are made.

    ~/.cache/trtllm-redrafter/native/kernels-KEY.so          KEY: hash of source, compiler, flags and processor
    ~/.cache/trtllm-redrafter/native/kernels-KEY.so.sha256   of the library, compared before it is loaded
    ~/.cache/trtllm-redrafter/cuda/FILE-KEY.cubin            kernels for a GPU, and their .sha256 likewise

Code is loaded from a file only if this user owns it and its directory and nobody else can write to either; a damaged
file is compiled again. One process compiles at a time; what a killed one left is removed by the next.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import secrets
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_SECONDS = 300
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NativeUnavailable(Exception):
    """Why the kernels cannot be had here; shown by `doctor`, `build` and `run`, never an error.

    `remedy` is set where something about this machine can be changed, and None where the model or the user asks for
    PyTorch.
    """

    def __init__(self, reason: str, *, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.remedy = remedy

    @property
    def note(self) -> str | None:
        """What to tell the user, who has to wait longer for it; None if there is nothing to change."""
        if self.remedy is None:
            return None
        return (
            f"bfloat16 runs through PyTorch here, several times slower than through the native kernels\n"
            f"  why: {self}\n  remedy: {self.remedy}"
        )


def cache_directory(name: str = "native") -> Path:
    """Below $XDG_CACHE_HOME if it is absolute (the specification has others ignored), else ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise NativeUnavailable(f"there is no home directory: {error}", remedy="set HOME") from error
    if not root.is_absolute():
        raise NativeUnavailable(f"the home directory {str(root.parent)!r} is not absolute", remedy="set HOME")
    return root / "trtllm-redrafter" / name


def find_compiler() -> str:
    """Path of a C++ compiler; CXX wins."""
    for name in (os.environ.get("CXX"), *_COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NativeUnavailable("no C++ compiler was found", remedy="install g++, or set CXX")


def distrust(path: Path) -> str | None:
    """Why code must not be loaded from this file or directory, or None."""
    found = path.lstat()
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        return f"{path} is neither a file nor a directory"
    if found.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if found.st_mode & _WRITABLE_BY_OTHERS:
        return f"others can write to {path}"
    return None


def check_cache(name: str = "native") -> Path:
    """The cache directory `name`, made with mode 0700 if need be; refused where others own it or can write to it."""
    folder = cache_directory(name)
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for part in (folder.parent, folder):
            part.mkdir(mode=0o700, exist_ok=True)
            reason = distrust(part)
            if reason is not None:
                remedy = f"remove it or run `chmod 700 {part}`, or set XDG_CACHE_HOME to a directory of your own"
                raise NativeUnavailable(f"the kernel cache is refused: {reason}", remedy=remedy)
    except OSError as error:
        why = f"the kernel cache cannot be used: {error}"
        raise NativeUnavailable(why, remedy="set XDG_CACHE_HOME to a directory that can be written") from error
    return folder


def compiled_library() -> Path:
    """Path of a library that may be loaded, compiled now if there is none or it is damaged. Seconds the first time."""
    compiler = find_compiler()
    folder = check_cache()
    target = folder / _name(compiler)
    try:
        if not is_intact(target):
            with _lock(folder, wait=True) as alone:
                _sweep(folder, alone)
                if not is_intact(target):  # another process may just have compiled it
                    _compile(compiler, target)
        elif any(_leftovers(folder)):
            with _lock(folder, wait=False) as alone:
                _sweep(folder, alone)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the kernels could not be compiled: {error}", remedy="check the compiler") from error
    return target


def is_intact(library: Path) -> bool:
    """Is the library this user's own, and every byte as it was written?"""
    return read_intact(library) is not None


def read_intact(file: Path) -> bytes | None:
    """A file's content if it is this user's own and every byte as it was written."""
    record = _record(file)
    try:
        if distrust(file) is not None or distrust(record) is not None:
            return None
        content = file.read_bytes()
        return content if record.read_text().strip() == hashlib.sha256(content).hexdigest() else None
    except (OSError, UnicodeDecodeError):
        return None


def keep(file: Path, content: bytes) -> None:
    """Write a file and its record, for `read_intact`. Raises OSError."""
    work = file.parent / f"build-{os.getpid()}-{secrets.token_hex(4)}"
    work.mkdir(mode=0o700)
    try:
        (work / file.name).write_bytes(content)
        _move(work / file.name, file.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move(built: Path, folder: Path) -> None:
    """Into the cache, the record first: a file without a fitting one is never loaded."""
    digest = _record(built)
    digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest() + "\n")
    for file in (digest, built):
        file.chmod(0o600)
        file.replace(folder / file.name)


def _record(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _name(compiler: str) -> str:
    key = hashlib.sha256()
    for part in (*_sources(), compiler, _version(compiler), " ".join(FLAGS), _processor()):
        key.update(part.encode())
        key.update(b"\0")
    return f"kernels-{key.hexdigest()[:24]}.so"


def _sources() -> Iterator[str]:
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".cpp", ".h"):
            yield file.name
            yield file.read_text(encoding="utf-8")


@functools.cache
def _version(compiler: str) -> str:
    try:
        run = subprocess.run([compiler, "--version"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{compiler} does not run: {error}", remedy="install g++, or set CXX") from error
    return run.stdout.decode(errors="replace")


def _processor() -> str:
    """What -march=native depends on; on Linux the flags the kernel reports."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return platform.machine() + platform.processor()


def _compile(compiler: str, target: Path) -> None:
    work = target.parent / f"build-{os.getpid()}-{secrets.token_hex(4)}"
    work.mkdir(mode=0o700)
    try:
        built = work / target.name
        command = [compiler, *FLAGS, str(SOURCES / "kernels.cpp"), "-o", str(built)]
        run = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False, cwd=work)
        if run.returncode != 0:
            said = run.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            remedy = "install a compiler with C++20 (GCC 11, Clang 14 or newer), or set CXX"
            raise NativeUnavailable(f"{compiler} failed: {said[0]}", remedy=remedy)
        _move(built, target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _lock(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Compilations of this user run one at a time; the lock goes with the process, however it ends.

    False: somebody else has it (without `wait`), or the file system has none. Compiling twice does no harm.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _leftovers(folder: Path) -> Iterator[Path]:
    """Directories that compilations work in; earlier versions called theirs tmp*."""
    return (p for p in folder.iterdir() if p.name.startswith(("build-", "tmp")) and p.is_dir() and not p.is_symlink())


def _sweep(folder: Path, alone: bool) -> None:
    """Remove what killed compilations left. Under the lock nobody works there."""
    if alone:
        for left in _leftovers(folder):
            shutil.rmtree(left, ignore_errors=True)
