"""Write an ONNX graph operator by operator.

Two programs read it: onnxruntime executes it, and TensorRT's compilers take it apart. Nothing in it is traced or
decomposed, so that attention, cache updates, norms and rotary embeddings reach them as the operators they are.

    graph = Graph()
    x = graph.input("x", FLOAT, ["batch", 4])
    graph.output("y", graph.op("Relu", x), FLOAT, ["batch", 4])
    onnx.save(graph.model(), "relu.onnx")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Value = str
"""The name of a tensor in the graph."""

Shape = Sequence[int | str]
"""Sizes; a name stands for one that is known at run time."""

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
INT32, INT64, BOOL, FLOAT8 = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT8E4M3FN

ELEMENT_TYPES: Mapping[str, int] = {"float32": FLOAT, "float16": FLOAT16, "bfloat16": BFLOAT16}
"""By the checkpoint's names of dtypes."""

OPSET = 24
"""The first with TensorScatter, the operator that updates a KV cache in place."""

_IR_VERSION = 11


class Graph:
    """A graph under construction. Every method that adds something returns the name of the new tensor."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[bytes, onnx.TensorProto] = {}
        self._count = 0

    def input(self, name: str, element: int, shape: Shape) -> Value:
        """A tensor given at run time; asked for twice, it is the same one."""
        if name not in self._inputs:
            self._inputs[name] = helper.make_tensor_value_info(name, element, list(shape))
        return name

    def output(self, name: str, value: Value, element: int, shape: Shape) -> None:
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}.out"))
        self.declare(name, element, shape)

    def declare(self, name: str, element: int, shape: Shape) -> None:
        """Make a tensor that a node already writes under this name an output."""
        self._outputs.append(helper.make_tensor_value_info(name, element, list(shape)))

    def op(self, kind: str, *inputs: Value, out: str | None = None, **attributes: Any) -> Value:
        """An operator with one output, called `out` where that is given; an input "" is left out."""
        return self.ops(kind, 1, *inputs, out=out, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: Value, out: str | None = None, **attributes: Any) -> list[Value]:
        """An operator with several outputs."""
        self._count += 1
        name = f"{kind}_{self._count}"
        made = [out] if out is not None else [f"{name}:{n}" for n in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), made, name=name, **attributes))
        return made

    def constant(self, values: NDArray[Any]) -> Value:
        """Values that are part of the graph; equal ones are stored once."""
        values = np.array(values, order="C")  # unlike ascontiguousarray, it keeps scalars
        key = f"{values.dtype}{values.shape}".encode() + values.tobytes()
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(values, f"constant_{len(self._constants)}")
        return str(self._constants[key].name)

    def ints(self, *values: int) -> Value:
        """[n] int64: shapes, axes, small tables."""
        return self.constant(np.array(values, np.int64))

    def integer(self, value: int) -> Value:
        return self.constant(np.array(value, np.int64))

    def real(self, value: float) -> Value:
        return self.constant(np.array(value, np.float32))

    def cast(self, value: Value, element: int) -> Value:
        return self.op("Cast", value, to=element)

    def reshape(self, value: Value, *sizes: int) -> Value:
        """To fixed sizes; 0 keeps a size and -1 is what is left."""
        return self.op("Reshape", value, self.ints(*sizes))

    def slice(self, value: Value, axis: int, start: int, stop: int) -> Value:
        return self.op("Slice", value, self.ints(start), self.ints(stop), self.ints(axis))

    def model(self) -> onnx.ModelProto:
        """The finished, checked model."""
        graph = helper.make_graph(
            self._nodes, "redrafter", list(self._inputs.values()), self._outputs, list(self._constants.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
        onnx.checker.check_model(model)
        return model
