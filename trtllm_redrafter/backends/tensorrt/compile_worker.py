"""Compile one network in a process of its own: python -m trtllm_redrafter.backends.tensorrt.compile_worker JOB.json

A compiler keeps memory until its process ends, and can take the process down with it. The job file says what to do
(`CompileJob`); what came of it is written to the job's `result` file (`CompileOutcome`), and the plan, compressed, to
`output`.
"""

from __future__ import annotations

import gzip
import json
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.tensorrt.compilers import COMPILERS, import_compiler
from trtllm_redrafter.errors import RedrafterError

Shapes = dict[str, list[list[int]]]
"""Input -> its smallest, usual and largest shape."""

_MAX_ERRORS = 4


@dataclass(frozen=True)
class CompileJob:
    """What to compile. `capability`: None, that of the GPU in this machine."""

    compiler: str
    model: str
    output: str
    result: str
    capability: list[int] | None
    shapes: Shapes
    memory_bytes: int
    """Address space that the process may take; what exceeds it fails, instead of the machine."""


@dataclass
class CompileOutcome:
    """What came of a job. Without `plan_bytes`, `errors` say why."""

    version: str = ""
    errors: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    """Operators that the compiler did not accept."""
    plan_bytes: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    """Layers of the network by kind."""
    product_types: dict[str, int] = field(default_factory=dict)
    """Types of the results of matrix products and attention."""
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


def compile_network(job: CompileJob) -> CompileOutcome:
    """Parse, examine, compile, write."""
    trt = import_compiler(COMPILERS[job.compiler])
    outcome, start = CompileOutcome(version=trt.__version__), time.perf_counter()
    logger = _logger(trt, outcome)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.model):
        errors = [parser.get_error(n) for n in range(parser.num_errors)]
        outcome.unsupported = sorted({error.node_operator() for error in errors if error.node_operator()})
        outcome.errors = [error.desc() for error in errors][:_MAX_ERRORS] or outcome.errors
        return outcome
    _examine(network, outcome)
    plan = builder.build_serialized_network(network, _config(trt, builder, job))
    if plan is not None:
        outcome.plan_bytes, outcome.errors = plan.nbytes, []
        with gzip.GzipFile(job.output, "wb", compresslevel=6, mtime=0) as file:
            file.write(memoryview(plan))
        outcome.file_bytes = Path(job.output).stat().st_size
    outcome.seconds = time.perf_counter() - start
    outcome.peak_bytes = _peak_bytes()
    return outcome


def _peak_bytes() -> int:
    """Most main memory that this process had at once. (`getrusage` counts what its parent had, too.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _network_flags(trt: Any) -> int:
    """Strongly typed: types are those of the network. From version 11 and in RTX, there is nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _config(trt: Any, builder: Any, job: CompileJob) -> Any:
    config = builder.create_builder_config()
    if job.capability is not None:
        major, minor = job.capability
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), 0)
    profile = builder.create_optimization_profile()
    for name, shapes in job.shapes.items():
        profile.set_shape(name, *map(tuple, shapes))
    config.add_optimization_profile(profile)
    return config


def _examine(network: Any, outcome: CompileOutcome) -> None:
    """Note what the network is made of, as the compiler understood it."""
    kinds: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds[layer.type.name] += 1
        if layer.type.name in ("MATRIX_MULTIPLY", "ATTENTION_OUTPUT"):
            products[layer.get_output(0).dtype.name] += 1
    outcome.layers, outcome.product_types = dict(kinds), dict(products)
    outcome.inputs = {t.name: t.dtype.name for t in map(network.get_input, range(network.num_inputs))}
    outcome.outputs = {t.name: t.dtype.name for t in map(network.get_output, range(network.num_outputs))}


def _logger(trt: Any, outcome: CompileOutcome) -> Any:
    """Collects the first errors instead of printing all of them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and len(outcome.errors) < _MAX_ERRORS:
                outcome.errors.append(message)

    return Logger()


def main(path: str) -> int:
    job = CompileJob(**json.loads(Path(path).read_text()))
    resource.setrlimit(resource.RLIMIT_AS, (job.memory_bytes, job.memory_bytes))
    try:
        outcome = compile_network(job)
    except MemoryError:
        outcome = CompileOutcome(errors=["out of memory"])
    except RedrafterError as error:
        outcome = CompileOutcome(errors=[error.render()])
    Path(job.result).write_text(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
