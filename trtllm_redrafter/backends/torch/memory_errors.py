"""Too little memory for a part of an engine, as a message that names the part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from trtllm_redrafter.errors import BackendError
from trtllm_redrafter.memory import is_out_of_memory


@contextmanager
def explained(what: str, *, why: str | None = None, remedy: str) -> Iterator[None]:
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
