"""Too little memory, recognised in one way, whichever allocator, loader or library it was that said it.

Nothing is imported here: this must work where there is no memory left to import PyTorch.
"""

from __future__ import annotations

import errno
import re
import resource

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
    """Was it memory that failed? `torch.OutOfMemoryError` is a RuntimeError that says so."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, _KINDS) and _SIGNS.search(str(error)) is not None
