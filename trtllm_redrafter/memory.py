"""Recognise out-of-memory errors, whichever allocator, loader or library raised them.

Nothing large is imported: this must work when too little memory is left to import PyTorch.
"""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from trtllm_redrafter.errors import BackendError

_SIGNS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED"
    r"|Storage size calculation over|failed to map segment|can't start new thread"
    r"|error return without exception set|without setting an exception",
    re.IGNORECASE,
)
"""In other exceptions' texts: of the driver, the CPU's allocator (Linux, Windows), cuBLAS, sizes beyond 64 bits, the
dynamic loader, threads, and CPython's own (a C function that failed to allocate its exception)."""

_KINDS = (RuntimeError, ImportError, SystemError)


MIN_ADDRESS_SPACE = 768 * 2**20
"""PyTorch alone maps some 600 MiB. Below that, imports fail in the middle, and differently each time."""


def address_space_limit() -> int | None:
    """Bytes that `ulimit -v` allows this process, where they are too few to import PyTorch; None: enough."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return limit if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_SPACE else None


def is_out_of_memory(error: BaseException) -> bool:
    """Is this an out-of-memory error? (`torch.OutOfMemoryError` is a RuntimeError with such a text.)"""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, _KINDS) and _SIGNS.search(str(error)) is not None


@contextmanager
def memory_for(what: str, *, why: str | None = None, remedy: str) -> Iterator[None]:
    """Turn an allocation that fails into "there is not enough memory for `what`"; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BackendError(f"there is not enough memory for {what}", why=why, remedy=remedy) from error


def physical_memory() -> int:
    """Bytes of main memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
