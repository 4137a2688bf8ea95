"""The TensorRT-LLM checkpoint format: config, tensor layout per rank, reader, writer, manifest, checks.

The three names are imported on first use: planning for a GPU host reads configs only and should not wait for torch,
which the reader needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_redrafter.checkpoint.config import CheckpointConfig
    from trtllm_redrafter.checkpoint.manifest import Manifest
    from trtllm_redrafter.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint", "CheckpointConfig", "Manifest"]

_MODULES = {"Checkpoint": "reader", "CheckpointConfig": "config", "Manifest": "manifest"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
