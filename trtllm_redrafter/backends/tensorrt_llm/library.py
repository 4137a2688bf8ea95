"""What both clients need of TensorRT-LLM itself: importing it, explaining its errors, reading its counters.

Its modules are imported by name, when a client is made: importing takes half a minute, and fails in obscure ways when
versions do not fit.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.tensorrt_llm.failures import explain
from trtllm_redrafter.errors import BackendError

_DOCTOR = "run `trtllm-redrafter doctor`"
_LONGEST = 500


def import_library(module: str) -> Any:
    """A module of tensorrt_llm; a mismatch of CUDA, MPI or torch shows as any kind of error while it is imported."""
    try:
        return import_module(module)
    except Exception as error:
        known = explain(str(error))
        raise BackendError(
            f"{module} cannot be imported" if known is None else known.what,
            why=f"{type(error).__name__}: {error}"[:_LONGEST],
            remedy=_DOCTOR if known is None else known.remedy,
        ) from error


def load_error(engine: Path, error: Exception, remedy: str) -> BackendError:
    """What to raise when the engine did not load; `remedy` is for messages that nobody knows."""
    known = explain(str(error))
    return BackendError(
        "the engine cannot be loaded" if known is None else known.what,
        where=engine,
        why=f"{type(error).__name__}: {error}"[:_LONGEST],
        remedy=remedy if known is None else known.remedy,
    )


def run_error(error: Exception) -> BackendError:
    """What to raise when a loaded engine fails as a whole."""
    known = explain(str(error))
    return BackendError(
        "the engine has failed while running" if known is None else known.what,
        why=f"{type(error).__name__}: {error}"[:_LONGEST],
        remedy="load it again; where it fails again, " + _DOCTOR if known is None else known.remedy,
    )


def drafted_tokens(holder: Any) -> int | None:
    """Drafted tokens as the release counts them; not every release does."""
    metrics = getattr(holder, "request_perf_metrics", None)
    counts = getattr(metrics, "speculative_decoding", None)
    return int(getattr(counts, "total_draft_tokens", None) or 0) or None
