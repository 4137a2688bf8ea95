"""Engines of the tensorrt backend without a compiler or a GPU: the stand-in's plans are the networks themselves.

Its runtime executes them with onnxruntime at the addresses it is given, so that what is tested around it (buffers,
shapes, when a graph is captured, who waits for whom) decides whether tokens come out right.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import onnx
import onnxruntime
import torch

from tests.backends.onnx_in_torch import TorchProgram
from tests.engines import build_options
from trtllm_redrafter.backends.engine_config import read_engine_config
from trtllm_redrafter.backends.tensorrt.backend import TensorRTBackend
from trtllm_redrafter.backends.tensorrt.build import _ELEMENTS, _TYPES
from trtllm_redrafter.backends.tensorrt.compile_worker import CompileJob, CompileOutcome
from trtllm_redrafter.backends.tensorrt.compilers import CompilerOptions
from trtllm_redrafter.backends.tensorrt.decoder import Decoder, Programs
from trtllm_redrafter.backends.tensorrt.engine import network_of, open_engine
from trtllm_redrafter.backends.tensorrt.execution import make_programs
from trtllm_redrafter.backends.tensorrt.network import CACHES
from trtllm_redrafter.backends.tensorrt.networks import Network
from trtllm_redrafter.backends.tensorrt.runner import StepRunner
from trtllm_redrafter.backends.tensorrt.weights import draft_rows, load_inputs
from trtllm_redrafter.checkpoint.config import read_checkpoint_config
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DraftShape

VERSION = "1.7.1.116"


def options(
    checkpoint: Path,
    output: Path,
    *,
    gpu: str = "rtx-4090",
    compiler: str = "auto",
    weights: str = "inputs",
    **changes: Any,
) -> Any:
    own = build_options(checkpoint, output, tensorrt=CompilerOptions(gpu, compiler, weights), **changes)
    return replace(own, backend="tensorrt")


def build(checkpoint: Path, output: Path, **changes: Any) -> Path:
    """Build with the real compiler, in its own processes."""
    backend = TensorRTBackend()
    return backend.build(backend.plan(options(checkpoint, output, **changes)), no_progress)


def build_without_compiler(checkpoint: Path, output: Path, **changes: Any) -> Path:
    dtype = read_checkpoint_config(checkpoint).dtype
    where = "trtllm_redrafter.backends.tensorrt.build."

    def stand_in(job: CompileJob, folder: Path, *, what: str) -> CompileOutcome:
        model = onnx.load(job.model)
        with gzip.open(job.output, "wb") as file:
            file.write(model.SerializeToString())
        sides = [{v.name: _ELEMENTS[v.type.tensor_type.elem_type] for v in side}
                 for side in (model.graph.input, model.graph.output)]  # fmt: skip
        return CompileOutcome(
            VERSION, plan_bytes=1, product_types={_TYPES[dtype]: 1}, inputs=sides[0], outputs=sides[1]
        )

    with patch(where + "run_job", stand_in), patch(where + "check_compiler", return_value=VERSION):
        return build(checkpoint, output, **changes)


def load(engine: Path, shape: DraftShape | None = None) -> StepRunner:
    """On onnxruntime."""
    return TensorRTBackend().load(engine, device="cpu", verify_hashes=True, draft_shape=shape, api="onnxruntime")


class Context:
    """An execution context on the CPU: it has nothing but the shapes and addresses that it was given."""

    def __init__(self, model: bytes, log: list[str]) -> None:
        config = onnxruntime.SessionOptions()
        config.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(model, config, providers=["CPUExecutionProvider"])
        parsed = onnx.load_from_string(model)
        self._log, self._shapes, self._addresses = log, {}, {}
        self._types = {v.name: v.type.tensor_type for v in (*parsed.graph.input, *parsed.graph.output)}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self._log.append("enqueue")
        binding = self._session.io_binding()
        batch = next(shape[0] for name, shape in self._shapes.items() if name == "active")
        for name, kind in self._types.items():
            declared = [d.dim_value or batch for d in kind.shape.dim]
            shape = self._shapes.get(name, declared)
            bind = binding.bind_output if name in {o.name for o in self._session.get_outputs()} else binding.bind_input
            bind(name, "cpu", 0, kind.elem_type, list(shape), self._addresses[name])
        for name, address in self._addresses.items():
            if name.startswith(CACHES):
                assert address == self._addresses[name.removesuffix(".out")], "a cache is updated in place"
        self._session.run_with_iobinding(binding)
        return True


class HostLauncher:
    """Where a stream would be. Capturing runs nothing, as on a GPU; replaying does what was captured."""

    handle = 7

    def __init__(self) -> None:
        self.log: list[str] = []

    def begin(self) -> None:
        self.log.append("begin")

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.log.append("capture")
        return launch

    def wait(self) -> None:
        self.log.append("wait")


class Logger:
    WARNING = 1

    def __init__(self, level: int) -> None:
        self.level = level


def stand_in_module(log: list[str], *, version: str = VERSION) -> Any:
    """The part of TensorRT's Python interface that running plans needs."""

    def deserialize(plan: bytes) -> Any:
        parsed = onnx.load_from_string(plan)
        inputs, outputs = ([v.name for v in side] for side in (parsed.graph.input, parsed.graph.output))
        names = [*inputs, *outputs]
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            get_tensor_mode=lambda name: "in" if name in inputs else "out",
            create_execution_context=lambda: Context(plan, log),
        )

    return SimpleNamespace(
        __version__=version,
        Logger=Logger,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize),
        TensorIOMode=SimpleNamespace(INPUT="in"),
    )


def load_on_stand_in(engine: Path, launcher: HostLauncher, *, version: str = VERSION) -> StepRunner:
    """A runner whose programs are those of a GPU, on the stand-in's memory."""
    config = read_engine_config(engine)
    found = open_engine(config, None, False, shape_is_free=False)
    device = torch.device("cpu")
    trt = stand_in_module(launcher.log, version=version)
    make = make_programs(found, device, trt=trt, launcher=launcher)
    decoder = Decoder(found.sizes, Programs(make, {}), max_batch_size=config.limits.max_batch_size, device=device)
    info = TensorRTBackend().load(engine, device="cpu", verify_hashes=False, api="onnxruntime").info
    return StepRunner(info, decoder, None, frozenset({2}))


def load_on_torch(engine: Path, device: str = "cpu") -> StepRunner:
    """The networks executed operator by operator in PyTorch, in every dtype."""
    config, target = read_engine_config(engine), torch.device(device)
    found = open_engine(config, None, False, shape_is_free=False)
    weights = load_inputs(found.checkpoint, draft_rows(found.checkpoint, found.sizes.draft_rows or 0), target)

    def make(drafted: bool, sampled: bool) -> TorchProgram:
        return TorchProgram(network_of(found, Network(drafted, sampled)), weights, target)

    decoder = Decoder(found.sizes, Programs(make, {}), max_batch_size=config.limits.max_batch_size, device=target)
    info = TensorRTBackend().load(engine, device="cpu", verify_hashes=False, api="onnxruntime").info
    return StepRunner(info, decoder, None, frozenset({2}))
