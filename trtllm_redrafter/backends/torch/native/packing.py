"""Weights as the kernels take them: what they can execute, shapes checked against the config, matrices packed."""

from __future__ import annotations

import ctypes
from dataclasses import fields

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.native.interface import TensorArgument, as_float32, call
from trtllm_redrafter.backends.torch.weights import ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.errors import MismatchError, Problem, raise_together

LANES = 16
"""Columns of a packed block; kernels/lanes.h has the same number."""


def unsupported_reason(config: CheckpointConfig, weights: ModelWeights) -> str | None:
    """Why the kernels cannot execute this model, or None."""
    reference = weights.embedding
    if reference.device.type != "cpu" or reference.dtype != torch.bfloat16:
        return f"the kernels compute bfloat16 on a CPU, not {reference.dtype} on {reference.device}"
    if any(layer.gate_proj_bias is not None or layer.down_proj_bias is not None for layer in weights.layers):
        return "the kernels have no MLP biases"
    sizes = (config.hidden_size, config.head_size, config.intermediate_size)
    if any(size % LANES for size in sizes):
        return f"hidden, head and intermediate size {sizes} must be multiples of {LANES}"
    return None


def check_shapes(config: CheckpointConfig, weights: ModelWeights) -> None:
    """`MismatchError` names every tensor whose shape is not what the config asks for."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_size
    heads = config.num_attention_heads * size
    wide = heads + 2 * config.num_key_value_heads * size
    shapes = {
        "input_norm": (hidden,), "qkv": (wide, hidden), "qkv_bias": (wide,), "q_norm": (size,), "k_norm": (size,),
        "dense": (hidden, heads), "dense_bias": (hidden,), "post_norm": (hidden,), "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip
    ends = {"embedding": (config.vocab_size, hidden), "head": (config.vocab_size, hidden), "final_norm": (hidden,)}
    found = [(name, getattr(weights, name), shape) for name, shape in ends.items()]
    for index, layer in enumerate(weights.layers):
        found += [
            (f"{field.name} of layer {index}", getattr(layer, field.name), shapes[field.name])
            for field in fields(layer)
            if field.name in shapes
        ]
    problems = [
        Problem(f"{name} is {list(tensor.shape)}, config.json asks for {list(shape)}")
        for name, tensor, shape in found
        if tensor is not None and tuple(tensor.shape) != shape
    ]
    if len(weights.layers) != config.num_hidden_layers:
        problems.append(Problem(f"there are {len(weights.layers)} layers, config.json says {config.num_hidden_layers}"))
    remedy = "convert the model again, or restore the config.json that belongs to these tensors"
    raise_together(MismatchError, problems, "the tensors do not fit config.json", remedy=remedy)


class Packer:
    """Packs matrices for the kernels and keeps every array alive that C++ points to."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._alive: list[Tensor] = []

    def matrix(self, weight: Tensor | None) -> TensorArgument:
        """[n, k] in the kernels' layout; None stays absent."""
        if weight is None:
            return TensorArgument.of(None)
        weight = weight.detach().to(torch.bfloat16).contiguous()
        rows, columns = weight.shape
        packed = torch.empty(-(-rows // LANES) * LANES * columns, dtype=torch.bfloat16)
        call(self._library.redrafter_pack, TensorArgument.of(weight), rows, columns, TensorArgument.of(packed))
        return self.keep(packed)

    def vector(self, values: Tensor | None) -> TensorArgument:
        """A copy as bfloat16; None stays absent."""
        return self.keep(None if values is None else values.detach().to(torch.bfloat16, copy=True).contiguous())

    def floats(self, values: Tensor | None) -> TensorArgument:
        """A copy as float32; None stays absent."""
        return self.keep(as_float32(values))

    def keep(self, values: Tensor | None) -> TensorArgument:
        """The tensor itself, alive from here on."""
        if values is not None:
            self._alive.append(values)
        return TensorArgument.of(values)
