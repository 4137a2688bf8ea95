"""Put the weights into the networks, for engines that are compiled with them: `tensorrt.weights: inside`.

A compiler that sees the weights may choose better kernels for them. Whether it does is not known yet. What it costs is:
a plan is as large as the weights, and there are four. They are written once, beside the networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor

_FILE = "weights.bin"
_ALIGNMENT = 64


class WeightFile:
    """Weights in one file of a folder, and where in it each is."""

    def __init__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        written: dict[int, tuple[int, int]] = {}
        with (folder / _FILE).open("wb") as file:
            for name, tensor in weights.items():
                if tensor.data_ptr() not in written:
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    written[tensor.data_ptr()] = (file.tell(), tensor.nbytes)
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                self._places[name] = written[tensor.data_ptr()]

    def put_into(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model with those of its inputs that are weights as initializers, to be saved in the file's folder."""
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        inputs = list(changed.graph.input)
        del changed.graph.input[:]
        for value in inputs:
            if value.name not in self._places:
                changed.graph.input.append(value)
                continue
            offset, length = self._places[value.name]
            kind = value.type.tensor_type
            stored = changed.graph.initializer.add(name=value.name, data_type=kind.elem_type)
            stored.dims.extend(dim.dim_value for dim in kind.shape.dim)
            stored.data_location = onnx.TensorProto.EXTERNAL
            for key, text in (("location", _FILE), ("offset", str(offset)), ("length", str(length))):
                stored.external_data.add(key=key, value=text)
        return changed
