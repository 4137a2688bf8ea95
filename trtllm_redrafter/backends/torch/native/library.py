"""Compile `kernels.cpp` for this machine and load it.

The library goes to the user's cache directory under a name made of the source, the compiler and the processor, so
that a change of any of them compiles anew. It is never stored in an engine: an engine holds data, not code. Where
no C++ compiler is found, or REDRAFTER_NATIVE=0 is set, the PyTorch executor serves instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_SECONDS = 300

p = ctypes.c_void_p
i32 = ctypes.c_int32


class ModelConfig(ctypes.Structure):
    """`RedrafterConfig` of kernels.cpp."""

    _fields_ = [
        *((name, i32) for name in ("hidden", "heads", "kv_heads", "head_size", "intermediate", "layers", "vocab")),
        *((name, i32) for name in ("max_slots", "max_seq", "max_rows", "threads")),
        ("epsilon", ctypes.c_float),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "redrafter_isa": (ctypes.c_char_p, []),
    "redrafter_pack": (None, [p, i32, i32, p]),
    "redrafter_create": (p, [ctypes.POINTER(ModelConfig)]),
    "redrafter_destroy": (None, [p]),
    "redrafter_set_layer": (None, [p, i32, *[p] * 11]),
    "redrafter_set_ends": (None, [p] * 6),
    "redrafter_forward": (None, [p, p, i32, p, p, i32, p, p]),
    "redrafter_commit": (None, [p, i32, i32, p, i32]),
    "redrafter_drafter_create": (p, [i32, i32, i32, i32, *[p] * 7, i32, p]),
    "redrafter_drafter_set_layer": (None, [p, i32, p, p]),
    "redrafter_drafter_destroy": (None, [p, p]),
    "redrafter_draft": (None, [p, p, p, p, i32, i32, i32, p, p]),
}


class NativeUnavailable(Exception):
    """Why the kernels cannot be had here; shown by `build` and `run --stats`, never an error."""


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "trtllm-redrafter" / "native"


def find_compiler() -> str:
    """Path of a C++ compiler; CXX wins."""
    for name in (os.environ.get("CXX"), *_COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NativeUnavailable("no C++ compiler was found (install g++ or set CXX)")


def _processor() -> str:
    """What -march=native depends on; on Linux the flags the kernel reports."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return platform.machine() + platform.processor()


def library_path(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    key = hashlib.sha256()
    for part in (SOURCE.read_text(), compiler, version, " ".join(FLAGS), _processor()):
        key.update(part.encode())
        key.update(b"\0")
    return cache_directory() / f"kernels-{key.hexdigest()[:24]}.so"


def compile_library() -> Path:
    """Path of the compiled library, made now if it is not cached. A few seconds the first time."""
    compiler = find_compiler()
    target = library_path(compiler)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
            if run.returncode != 0:
                raise NativeUnavailable(f"{compiler} failed: {run.stderr.strip().splitlines()[:1]}")
            built.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the kernels could not be compiled: {error}") from error
    return target


@functools.cache
def load_library() -> ctypes.CDLL:
    """The kernels, ready to call. Raises `NativeUnavailable` with the reason where they cannot be had."""
    if os.environ.get("REDRAFTER_NATIVE") == "0":
        raise NativeUnavailable("REDRAFTER_NATIVE=0")
    try:
        library = ctypes.CDLL(str(compile_library()))
    except OSError as error:
        raise NativeUnavailable(f"the kernels could not be loaded: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def usable_cores() -> int:
    """Cores this process may run on; REDRAFTER_THREADS overrides."""
    asked = os.environ.get("REDRAFTER_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
