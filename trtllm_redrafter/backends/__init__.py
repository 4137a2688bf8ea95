"""Backends by name. A backend's module is imported when it is asked for, so that one never needs the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from trtllm_redrafter.backends.base import Backend
from trtllm_redrafter.errors import BackendError, UsageError


def _torch() -> Backend:
    from trtllm_redrafter.backends.torch.backend import TorchBackend

    return TorchBackend()


def _tensorrt_llm() -> Backend:
    from trtllm_redrafter.backends.tensorrt_llm.backend import TensorRTLLMBackend

    return TensorRTLLMBackend()


def _tensorrt() -> Backend:
    if importlib.util.find_spec("onnx") is None:
        remedy = "pip install 'trtllm-redrafter[tensorrt-rtx]', or [tensorrt] for data-centre GPUs"
        raise BackendError("the tensorrt backend needs the package onnx, which is not installed", remedy=remedy)
    from trtllm_redrafter.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend()


_BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": _torch,
    "tensorrt-llm": _tensorrt_llm,
    "tensorrt": _tensorrt,
}

BACKEND_NAMES = tuple(_BACKENDS)


def load_backend(name: str) -> Backend:
    """The backend called `name`; `UsageError` lists the ones there are."""
    if name not in _BACKENDS:
        raise UsageError(
            f"there is no backend {name!r} in this version", remedy=f"use one of: {', '.join(BACKEND_NAMES)}"
        )
    return _BACKENDS[name]()


AUTO_DEVICE = "auto"


def torch_device(asked: str = AUTO_DEVICE) -> str:
    """The torch backend's device; "auto" is a GPU if there is one."""
    if asked != AUTO_DEVICE:
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
