"""Too little memory, said in one way, whichever allocator it was that said it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trtllm_redrafter.errors import BackendError

_SIGNS = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|Storage size calculation over")
"""In a plain RuntimeError: of the driver, the CPU's allocator (Linux, Windows), cuBLAS, and sizes beyond 64 bits."""


@contextmanager
def explained(what: str, *, why: str | None = None, remedy: str) -> Iterator[None]:
    """Turn an allocation that fails into "there is not enough memory for `what`"; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not _SIGNS.search(str(error)):
            raise
        raise BackendError(f"there is not enough memory for {what}", why=why, remedy=remedy) from error
