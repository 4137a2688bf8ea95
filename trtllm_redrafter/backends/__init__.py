"""Backends by name. A backend's module is imported when it is asked for, so that one never needs the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trtllm_redrafter.backends.base import Backend
from trtllm_redrafter.errors import InputError, UsageError
from trtllm_redrafter.fsio import read_json

ENGINE_CONFIG = "config.json"


def _torch() -> Backend:
    from trtllm_redrafter.backends.torch.backend import TorchBackend

    return TorchBackend()


def _tensorrt_llm() -> Backend:
    from trtllm_redrafter.backends.tensorrt_llm.backend import TensorRTBackend

    return TensorRTBackend()


_BACKENDS: dict[str, Callable[[], Backend]] = {"torch": _torch, "tensorrt-llm": _tensorrt_llm}

BACKEND_NAMES = tuple(_BACKENDS)


def load_backend(name: str) -> Backend:
    """The backend called `name`; `UsageError` names those there are."""
    if name not in _BACKENDS:
        raise UsageError(
            f"there is no backend {name!r} in this version", remedy=f"use one of: {', '.join(BACKEND_NAMES)}"
        )
    return _BACKENDS[name]()


def engine_backend(engine: Path) -> str:
    """Name of the backend that an engine directory was built for; `InputError` when it is no engine."""
    if not engine.is_dir():
        raise InputError("the engine directory does not exist", where=engine, remedy="check the path, or run `build`")
    config = read_json(engine / ENGINE_CONFIG)
    if "backend" in config:
        return str(config["backend"])
    if "pretrained_config" in config and "build_config" in config:
        return "tensorrt-llm"
    if "architecture" in config:
        raise InputError(
            "this is a checkpoint, not an engine",
            where=engine,
            why="it has not been built for a backend",
            remedy="run `trtllm-redrafter build --checkpoint` on it and pass that output to --engine",
        )
    raise InputError(
        "this is not an engine", where=engine, why="its config.json names no backend", remedy="check the path"
    )
