"""The compiled kernels as a ctypes library.

They are compiled for this machine at first use and kept in the user's cache directory (`compiled.py`), never in an
engine: an engine holds data, not code. Where no C++ compiler is found, or REDRAFTER_NATIVE=0 is set, the PyTorch
executor serves instead.
"""

from __future__ import annotations

import ctypes
import functools
import os

from trtllm_redrafter.backends.torch.native.compiled import NativeUnavailable, compiled_library
from trtllm_redrafter.backends.torch.native.interface import declare

MAX_THREADS = 1024
"""The kernels start no more; kernels/team.h has the same number."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """The kernels, ready to call. Raises `NativeUnavailable` with the reason if there are none."""
    if os.environ.get("REDRAFTER_NATIVE") == "0":
        raise NativeUnavailable("REDRAFTER_NATIVE=0")
    path = compiled_library()
    try:
        library = ctypes.CDLL(str(path))
        declare(library)
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"the kernels could not be loaded: {error}", remedy=f"remove {path}") from error
    return library


def usable_cores() -> int:
    """Cores this process may run on, at most `MAX_THREADS`; REDRAFTER_THREADS overrides."""
    asked = os.environ.get("REDRAFTER_THREADS", "")
    if asked.isascii() and asked.isdigit() and int(asked[:9]) > 0:
        return min(int(asked[:9]), MAX_THREADS)
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)
