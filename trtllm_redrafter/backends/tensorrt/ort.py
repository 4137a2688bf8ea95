"""Run an engine's networks with onnxruntime: on any CPU, or through its CUDA provider.

This is how an engine is proved where no GPU is that its compiled plans run on: the same networks, the same checkpoint,
the same runner. onnxruntime is imported when a program is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import Tensor

from trtllm_redrafter.backends.tensorrt.graph import BFLOAT16, BOOL, FLOAT, FLOAT8, FLOAT16, INT32, INT64
from trtllm_redrafter.errors import BackendError

_ELEMENTS = {
    torch.float32: FLOAT, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.int32: INT32, torch.int64: INT64,
    torch.bool: BOOL, torch.float8_e4m3fn: FLOAT8,
}  # fmt: skip


def onnxruntime() -> Any:
    """The package; `BackendError` where it is missing."""
    try:
        import onnxruntime as package
    except ImportError as error:
        remedy = "pip install 'trtllm-redrafter[onnxruntime]'"
        raise BackendError("onnxruntime is not installed", why=str(error), remedy=remedy) from error
    return package


class OnnxProgram:
    """A session with the weights bound; whatever else `run` is given is bound anew each time."""

    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, Tensor], device: torch.device) -> None:
        package = onnxruntime()
        options = package.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = max(1, torch.get_num_threads())
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = ("CUDAExecutionProvider", {"device_id": device.index or 0}) if device.type == "cuda" else None
        try:
            self._session = package.InferenceSession(
                model.SerializeToString(),
                options,
                providers=[*([provider] if provider else []), "CPUExecutionProvider"],
            )
        except Exception as error:  # its exception types are private
            why, remedy = str(error), "convert with --dtype float32: on a CPU it lacks most 16-bit operators"
            raise BackendError("onnxruntime cannot run this network", why=why, remedy=remedy) from error
        self._binding = self._session.io_binding()
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = {value.name for value in self._session.get_outputs()}
        self._weights = dict(weights)  # kept alive: the session has their addresses
        for name, tensor in weights.items():
            if name in self._inputs:
                self._bind(self._binding.bind_input, name, tensor)

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self._inputs:
                self._bind(self._binding.bind_input, name, tensor)
            if name in self._outputs:
                self._bind(self._binding.bind_output, name, tensor)
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def close(self) -> None:
        self._weights.clear()
        del self._binding, self._session

    def _bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        assert tensor.is_contiguous(), name
        device = tensor.device
        bind(name, device.type, device.index or 0, _ELEMENTS[tensor.dtype], list(tensor.shape), tensor.data_ptr())
