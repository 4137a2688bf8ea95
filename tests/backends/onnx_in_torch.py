"""Execute the tensorrt backend's networks operator by operator in PyTorch: in 16 bits too, and on a GPU.

onnxruntime's CPU kernels lack bfloat16. This is the second opinion: each operator as the ONNX specification defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F

DTYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 16: torch.bfloat16}
Attributes = Mapping[str, Any]


class TorchProgram:
    """A `Program` of the decoder's."""

    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._nodes = [
            (node.op_type, list(node.input), list(node.output),
             {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})
            for node in model.graph.node
        ]  # fmt: skip
        self._outputs = [value.name for value in model.graph.output]
        constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
        self._known = {name: tensor.to(device) for name, tensor in constants.items()} | dict(weights)

    @torch.no_grad()
    def run(self, tensors: Mapping[str, Tensor]) -> None:
        values = self._known | dict(tensors)
        for kind, inputs, outputs, attributes in self._nodes:
            found = OPERATORS[kind](attributes, *(values[name] if name else None for name in inputs))
            values.update(zip(outputs, found if isinstance(found, list | tuple) else [found], strict=True))
        for name in self._outputs:
            if values[name].data_ptr() != tensors[name].data_ptr():
                tensors[name].copy_(values[name])

    def close(self) -> None:
        self._known = {}


def _axes(x: Tensor | None) -> list[int]:
    return [] if x is None else x.flatten().tolist()


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor) -> Tensor:
    index = [slice(None)] * x.dim()
    for axis, start, end in zip(_axes(axes), _axes(starts), _axes(ends), strict=True):
        index[axis] = slice(start, end)
    return x[tuple(index)]


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[at] if size == 0 else size for at, size in enumerate(_axes(shape))])


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(_axes(axes)):
        x = x.unsqueeze(axis)
    return x


def _gather_nd(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    """With `batch_dims` leading dimensions in common and one or two indices after them."""
    shared, depth = a["batch_dims"], index.shape[-1]
    batch = x.reshape(-1, *x.shape[shared:])
    rows = index.reshape(len(batch), -1, depth)
    first = torch.arange(len(batch), device=x.device).unsqueeze(1)
    return batch[(first, *rows.unbind(-1))].reshape(*index.shape[:-1], *x.shape[shared + depth :])


def _scatter(a: Attributes, cache: Tensor, update: Tensor, at: Tensor) -> Tensor:
    """In place, as the decoder binds it."""
    for row, start in enumerate(at.tolist()):
        cache[row, :, start : start + update.shape[2]] = update[row]
    return cache


def _attention(a: Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(groups, dim=1) for x in (k, v)]
    return F.scaled_dot_product_attention(q, *wide, attn_mask=mask, scale=a["scale"])


def _norm(a: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + a["epsilon"])).to(x.dtype)


def _rotary(a: Attributes, x: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor) -> Tensor:
    c, s = cosine[positions].unsqueeze(1), sine[positions].unsqueeze(1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * c - high * s, high * c + low * s], dim=-1)


def _gemm(a: Attributes, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    assert a["transB"] == 1
    return F.linear(x, w, bias)


def _pad(a: Attributes, x: Tensor, pads: Tensor, value: Tensor) -> Tensor:
    before, after = _axes(pads)[: x.dim()], _axes(pads)[x.dim() :]
    assert not any(before)
    return F.pad(x, [n for size in reversed(after) for n in (0, size)], value=value.item())


def _div(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else x.div(y, rounding_mode="trunc")


def _top_k(a: Attributes, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest index first among equals, as the specification says."""
    values, order = x.sort(dim=a["axis"], descending=True, stable=True)
    count = int(k)
    return values.narrow(a["axis"], 0, count), order.narrow(a["axis"], 0, count)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, x, y: x + y,
    "And": lambda a, x, y: x & y,
    "Attention": _attention,
    "Cast": lambda a, x: x.to(DTYPES[a["to"]]),
    "Concat": lambda a, *xs: torch.cat(xs, dim=a["axis"]),
    "CumSum": lambda a, x, axis: x.cumsum(int(axis)),
    "DequantizeLinear": lambda a, x, scale: x.to(scale.dtype) * scale,
    "Div": lambda a, x, y: _div(x, y),
    "Equal": lambda a, x, y: x == y,
    "Exp": lambda a, x: x.exp(),
    "Expand": lambda a, x, shape: x * torch.ones(_axes(shape), dtype=x.dtype, device=x.device),
    "Gather": lambda a, x, index: x.index_select(a.get("axis", 0), index.flatten()).reshape(
        *x.shape[: a.get("axis", 0)], *index.shape, *x.shape[a.get("axis", 0) + 1 :]
    ),
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Greater": lambda a, x, y: x > y,
    "GreaterOrEqual": lambda a, x, y: x >= y,
    "Identity": lambda a, x: x,
    "IsInf": lambda a, x: x.isinf(),
    "IsNaN": lambda a, x: x.isnan(),
    "Less": lambda a, x, y: x < y,
    "LessOrEqual": lambda a, x, y: x <= y,
    "Log": lambda a, x: x.log(),
    "MatMul": lambda a, x, y: x @ y,
    "Max": lambda a, x, y: torch.maximum(x, y),
    "Min": lambda a, x, y: torch.minimum(x, y),
    "Mul": lambda a, x, y: x * y,
    "Not": lambda a, x: ~x,
    "Or": lambda a, x, y: x | y,
    "Pad": _pad,
    "RMSNormalization": _norm,
    "Range": lambda a, first, last, step: torch.arange(int(first), int(last), int(step), device=first.device),
    "ReduceMax": lambda a, x, axes: x.amax(_axes(axes), keepdim=bool(a["keepdims"])),
    "ReduceMin": lambda a, x, axes: x.amin(_axes(axes), keepdim=bool(a["keepdims"])),
    "ReduceSum": lambda a, x, axes: x.sum(_axes(axes), keepdim=bool(a["keepdims"])),
    "Reshape": lambda a, x, shape: _reshape(x, shape),
    "RotaryEmbedding": _rotary,
    "Shape": lambda a, x: torch.tensor(x.shape, device=x.device),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Slice": lambda a, *xs: _slice(*xs),
    "Softmax": lambda a, x: x.softmax(a["axis"]),
    "Split": lambda a, x, sizes: list(x.split(_axes(sizes), dim=a["axis"])),
    "Squeeze": lambda a, x: x.squeeze(),
    "Sub": lambda a, x, y: x - y,
    "TensorScatter": _scatter,
    "TopK": _top_k,
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": lambda a, x, axes: _unsqueeze(x, axes),
    "Where": lambda a, condition, x, y: torch.where(condition, x, y),
}
