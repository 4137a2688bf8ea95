"""Run compiled plans on a GPU. Never run yet: no machine with such a card and this compiler has been at hand.

PyTorch holds the memory, because the checkpoint is read into its tensors anyway, and its streams and CUDA graphs need
no further package. A pass that comes again with the same shapes is captured into a graph, at its second time, and
replayed from then on; prompts, whose lengths differ, are launched as they come.

    run 1   enqueue                      TensorRT prepares what it needs
    run 2   capture, then replay
    run 3.. replay                       one launch a step
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trtllm_redrafter.backends.tensorrt.compilers import COMPILERS, capability_text, import_compiler
from trtllm_redrafter.backends.tensorrt.decoder import Choices, Program
from trtllm_redrafter.backends.tensorrt.engine import CompiledEngine, network_of
from trtllm_redrafter.backends.tensorrt.network import CACHES
from trtllm_redrafter.backends.tensorrt.networks import Network
from trtllm_redrafter.backends.tensorrt.weights import draft_rows, load_inputs
from trtllm_redrafter.errors import BackendError, InputError
from trtllm_redrafter.memory import memory_for

_ALIGNMENT = 256
"""Bytes that TensorRT wants the address of a tensor to be a multiple of."""


class Launcher(Protocol):
    """Where a program is launched: a CUDA stream."""

    handle: int

    def begin(self) -> None:
        """What is launched from here on comes after what the caller has copied."""
        ...

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """What launches the same again, as one graph. `launch` is recorded, not carried out."""
        ...

    def wait(self) -> None:
        """Until all that was launched is done."""
        ...


class CudaLauncher:
    """A stream of its own on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.handle: int = self._stream.cuda_stream

    def begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            launch()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def wait(self) -> None:
        self._stream.synchronize()


class PlanProgram:
    """An execution context with the weights bound. What a pass is given is copied to places that stay the same."""

    def __init__(self, context: Any, inputs: set[str], outputs: set[str], weights: Mapping[str, Tensor],
                 launcher: Launcher, *, given: Callable[[str], bool], captures: bool) -> None:  # fmt: skip
        """`given`: is an input of this name new in each pass? `captures`: do passes come again with equal shapes?"""
        self._context, self._inputs, self._outputs = context, inputs, outputs
        self._launcher, self._given, self._captures = launcher, given, captures
        self._weights = weights  # kept alive: the context has their addresses
        self._places: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._graphs: dict[object, Callable[[], None] | None] = {}
        for name in inputs & weights.keys():
            context.set_tensor_address(name, weights[name].data_ptr())

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        tensors = {name: tensor for name, tensor in tensors.items() if name in self._inputs | self._outputs}
        bound = {name: self._place(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if name in self._inputs and bound[name] is not tensor:
                bound[name].copy_(tensor)
        key = tuple((name, tuple(t.shape), t.data_ptr()) for name, t in sorted(bound.items()))
        self._bind(bound)
        self._launcher.begin()
        self._launch(key)
        self._launcher.wait()
        for name, tensor in tensors.items():
            if name in self._outputs and bound[name] is not tensor:
                tensor.copy_(bound[name])

    def close(self) -> None:
        self._graphs.clear()
        self._places.clear()
        self._context = None

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor itself; a copy's place for what is new in each pass, or at an address that TensorRT refuses."""
        if not self._given(name) and tensor.data_ptr() % _ALIGNMENT == 0:
            return tensor
        in_place = name.startswith(CACHES)  # input and output must be one memory
        key = (name.removesuffix(".out") if in_place else name, tuple(tensor.shape))
        if key not in self._places:
            self._places[key] = torch.empty_like(tensor)
        return self._places[key]

    def _bind(self, bound: Mapping[str, Tensor]) -> None:
        for name, tensor in bound.items():
            if name in self._inputs:
                self._context.set_input_shape(name, tuple(tensor.shape))
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise BackendError(f"TensorRT does not take the memory of {name!r}", remedy="report it")

    def _launch(self, key: object) -> None:
        if not self._captures or key not in self._graphs:
            self._enqueue()
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._launcher.capture(self._enqueue)
        graph()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._launcher.handle):
            raise BackendError("TensorRT could not start a pass", remedy="report it with the engine's config.json")


def make_programs(
    engine: CompiledEngine, device: torch.device, *, trt: Any = None, launcher: Launcher | None = None
) -> Callable[[bool, bool], Program]:
    """Programs from an engine's plans; `BackendError` says why this machine cannot run them.

    `trt` and `launcher` take the place of the compiler's module and of a CUDA stream.
    """
    compiler = COMPILERS[engine.file.compiler.name]
    if trt is None:
        trt = import_compiler(compiler)
    _check_version(engine, str(trt.__version__))
    if launcher is None:
        _check_card(engine, device)
        launcher = CudaLauncher(device)
    weights: Mapping[str, Tensor] = {}
    if engine.file.weights == "inputs":
        rows = draft_rows(engine.checkpoint, engine.sizes.draft_rows or 0)
        with memory_for("the weights", why=str(device), remedy="use a GPU with more, or end what else runs on it"):
            weights = load_inputs(engine.checkpoint, rows, device)
    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)

    def make(drafted: bool, sampled: bool) -> Program:
        network = Network(drafted, sampled)
        network_of(engine, network)
        path = engine.config.path / engine.file.networks[network.name].file
        plan = runtime.deserialize_cuda_engine(read_plan(path))
        if plan is None:
            why = "TensorRT says so; the plan is for another card, driver or version"
            raise BackendError("the plan cannot be loaded", where=path, why=why, remedy="build the engine here")
        names = [plan.get_tensor_name(n) for n in range(plan.num_io_tensors)]
        inputs = {name for name in names if plan.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        assert launcher is not None
        return PlanProgram(
            plan.create_execution_context(), inputs, set(names) - inputs, weights, launcher,
            given=GIVEN.__contains__, captures=drafted,
        )  # fmt: skip

    return make


GIVEN = frozenset(("tokens", "active", "drafted", *(field.name for field in fields(Choices))))
"""Inputs that a pass brings along; all others stay where they are."""


def read_plan(path: Path) -> bytes:
    """A plan's bytes; `InputError` when the file is damaged."""
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InputError("the plan is damaged", where=path, why=str(error), remedy="build the engine again") from error


def _check_version(engine: CompiledEngine, version: str) -> None:
    built = engine.file.compiler
    if version != built.version:
        raise BackendError(
            f"the engine was built with {built.name} {built.version}, this is {version}",
            where=engine.config.path,
            why="a plan runs on the version that compiled it",
            remedy=f"install {built.name} {built.version}, or build the engine again",
        )


def _check_card(engine: CompiledEngine, device: torch.device) -> None:
    file = engine.file
    remedy = "run with --executor onnxruntime, or on a host with that GPU"
    if not torch.cuda.is_available():
        raise BackendError("there is no GPU to run the plan on", why=f"it is for {file.gpu}", remedy=remedy)
    major, minor = torch.cuda.get_device_capability(device)
    if [major, minor] == file.compute_capability:
        return
    name, capability = torch.cuda.get_device_name(device), capability_text((major, minor))
    known = COMPILERS[file.compiler.name].capabilities
    if known is not None and (major, minor) not in known:
        why = f"{file.compiler.name} does not know compute capability {capability}"
        remedy = "build with --compiler tensorrt on this host"
        raise BackendError(f"{name} cannot run this engine", where=engine.config.path, why=why, remedy=remedy)
    why = f"it was compiled for {file.gpu}, and {name} has compute capability {capability}"
    raise BackendError(
        "the plan is for another card", where=engine.config.path, why=why, remedy="build it for this one"
    )
