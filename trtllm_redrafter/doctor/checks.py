"""The checks: what was found, what is needed, and the remedy."""

from __future__ import annotations

import enum
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.tensorrt.compilers import COMPILERS, choose_compiler
from trtllm_redrafter.backends.tensorrt_llm.machine import (
    FoundGpu,
    cuda_version,
    find_gpus,
    find_mpi,
    find_program,
    installed_version,
)
from trtllm_redrafter.backends.tensorrt_llm.versions import (
    CONTAINER,
    MIN_COMPUTE_CAPABILITY,
    MIN_DRIVER,
    PYTHON_VERSIONS,
    REQUIREMENTS,
    TARGET,
    Status,
    parse_version,
    release_for,
    same_line,
    satisfies,
)
from trtllm_redrafter.backends.torch.native.compiled import NativeUnavailable, check_cache, find_compiler
from trtllm_redrafter.doctor.host import inside_container, main_memory, shared_memory_bytes
from trtllm_redrafter.paths import existing_parent
from trtllm_redrafter.planning.gpus import gpu as planned_gpu

BACKENDS = ("torch", "tensorrt-llm", "tensorrt")


class State(enum.Enum):
    """The outcome of a check."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One check and the backends that need it to pass."""

    name: str
    state: State
    found: str
    backends: tuple[str, ...]
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "state": self.state.value, "backends": list(self.backends)}


@dataclass(frozen=True)
class Needs:
    """A recipe's requirements for the machine that builds and runs it."""

    version: str
    gpu: str
    ranks: int
    output: Path
    workers: int
    """Ranks built at the same time."""
    disk_bytes: int
    host_bytes: int
    """Main memory of a build, all workers together."""


@dataclass(frozen=True)
class DoctorReport:
    """All checks; a backend can be used if none of its checks failed."""

    checks: tuple[Check, ...]

    def serves(self, backend: str) -> bool:
        return not any(check.state is State.FAIL and backend in check.backends for check in self.checks)

    def render(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.state.value:<4}  {check.name:<{width}}  {check.found}")
            if check.remedy and check.state is not State.OK:
                lines.append(f"      {'':<{width}}  remedy: {check.remedy}")
        lines.append("")
        for backend in BACKENDS:
            reasons = [c.name for c in self.checks if c.state is State.FAIL and backend in c.backends]
            answer = "can be used here" if not reasons else "cannot: " + ", ".join(reasons)
            lines.append(f"{backend:<12}  {answer}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        serves = {backend: self.serves(backend) for backend in BACKENDS}
        return {"checks": [check.as_dict() for check in self.checks], "serves": serves}


TRT = ("tensorrt-llm",)
STEPS = ("tensorrt",)
OWN_REQUIREMENTS = {"torch": ">=2.9", "transformers": ">=4.57,<6", "safetensors": ">=0.5", "numpy": ">=1.26"}
"""Requirements of this package itself, for either backend; pyproject.toml has the same ranges."""

_SHARED_MEMORY = 10**9
"""NVIDIA's recommendation for NCCL in containers; Docker's default is 64 MB."""


def examine(needs: Needs | None) -> DoctorReport:
    """Examine this machine, and whether it meets a recipe's needs if they are given."""
    return DoctorReport(tuple(all_checks(needs)))


def all_checks(needs: Needs | None) -> Iterator[Check]:
    gpus = find_gpus()
    yield _python()
    yield from _own_packages()
    yield _native_kernels()
    yield _tensorrt_llm(needs)
    yield from _pinned_packages()
    yield _program("trtllm-build")
    yield _libmpi()
    yield from _gpu_checks(gpus, needs)
    yield from _compilers(needs)
    yield _container()
    if needs is not None:
        yield from _needs(needs)


def _python() -> Check:
    version = platform.python_version()
    minor = ".".join(version.split(".")[:2])
    if parse_version(version) < (3, 10):
        return Check("python", State.FAIL, version, BACKENDS, "use Python 3.10 or newer")
    if minor not in PYTHON_VERSIONS or platform.system() != "Linux":
        found = (
            f"{version} on {platform.system()}: TensorRT-LLM has wheels for {' and '.join(PYTHON_VERSIONS)} on Linux"
        )
        return Check("python", State.FAIL, found, TRT, f"use {CONTAINER}, or Python 3.12")
    return Check("python", State.OK, version, BACKENDS)


def _own_packages() -> Iterator[Check]:
    for name, needed in OWN_REQUIREMENTS.items():
        version = installed_version(name)
        if version is None:
            yield Check(name, State.FAIL, "not installed", BACKENDS, f"pip install '{name}{needed}'")
        elif not satisfies(version, needed):
            yield Check(name, State.FAIL, f"{version}, {needed} is needed", BACKENDS, f"pip install '{name}{needed}'")
        else:
            yield Check(name, State.OK, version, BACKENDS)


def _native_kernels() -> Check:
    """Whether the native bfloat16 CPU kernels can be used; the torch backend works without. Compiles nothing."""
    if os.environ.get("REDRAFTER_NATIVE") == "0":
        return Check("native kernels", State.OK, "switched off by REDRAFTER_NATIVE=0", ())
    try:
        compiler, folder = find_compiler(), check_cache()
    except NativeUnavailable as unavailable:
        found = f"{unavailable}; bfloat16 on a CPU runs through PyTorch, several times slower"
        return Check("native kernels", State.WARN, found, (), unavailable.remedy)
    return Check("native kernels", State.OK, f"compiled with {compiler} into {folder}", ())


def _tensorrt_llm(needs: Needs | None) -> Check:
    version, wanted = installed_version("tensorrt_llm"), TARGET if needs is None else needs.version
    if version is None:
        return Check("tensorrt_llm", State.FAIL, "not installed", TRT, f"use {CONTAINER}")
    release = release_for(version)
    if release is None or release.status is Status.REFUSED:
        why = release.notes[0] if release is not None else "not a version this package knows"
        return Check("tensorrt_llm", State.FAIL, f"{version}: {why}", TRT, f"use {CONTAINER}")
    if not same_line(version, wanted):
        return Check("tensorrt_llm", State.WARN, f"{version}, {wanted} is planned for", TRT, f"use {CONTAINER}")
    return Check("tensorrt_llm", State.OK, version, TRT)


def _pinned_packages() -> Iterator[Check]:
    """Versions pinned by the 1.2.1 wheel; others fail at import with misleading messages."""
    if installed_version("tensorrt_llm") is None:
        return
    for name, needed in REQUIREMENTS.items():
        version = installed_version(name)
        found = f"{version or 'not installed'}, TensorRT-LLM {TARGET} pins {needed}"
        if version is None or not satisfies(version.split(".post")[0], needed):
            state = State.FAIL if version is None or name in ("torch", "tensorrt") else State.WARN
            yield Check(f"{name} for TensorRT-LLM", state, found, TRT, f"use {CONTAINER}, or install that version")


def _program(name: str) -> Check:
    path = find_program(name)
    if path is None:
        return Check(name, State.FAIL, "not on PATH", TRT, "it comes with tensorrt_llm 1.2; 1.3 has removed it")
    return Check(name, State.OK, str(path), TRT)


def _libmpi() -> Check:
    found = find_mpi()
    if found is None:
        remedy = "apt-get install libopenmpi-dev (libmpi.so.40)"
        return Check("libmpi", State.FAIL, "not found", TRT, remedy)
    return Check("libmpi", State.OK, found, TRT)


def _gpu_checks(gpus: list[FoundGpu], needs: Needs | None) -> Iterator[Check]:
    if not gpus:
        remedy = "build and run on a GPU host; `plan` and `build --dry-run` work here"
        if inside_container():
            remedy = "start the container with --gpus all (it needs NVIDIA's container toolkit on the host)"
        yield Check("gpu", State.FAIL, "none: nvidia-smi is missing or finds none", TRT, remedy)
        return
    first = gpus[0]
    names = ", ".join(f"{g.name} ({g.memory_bytes / 1e9:.0f} GB, {g.sm})" for g in gpus)
    if first.compute_capability < MIN_COMPUTE_CAPABILITY:
        yield Check("gpu", State.FAIL, names, TRT, "compute capability 8.0 or newer is needed")
    else:
        yield Check("gpu", State.OK, names, TRT)
    branch = parse_version(first.driver)[:1]
    cuda = f", CUDA runtime {version}" if (version := cuda_version()) else ""
    if branch and branch[0] < MIN_DRIVER:
        remedy = f"install driver {MIN_DRIVER} or newer, or a container with NVIDIA's CUDA compatibility package"
        yield Check("driver", State.WARN, f"{first.driver}{cuda}: CUDA 13 needs {MIN_DRIVER}", TRT, remedy)
    else:
        yield Check("driver", State.OK, first.driver + cuda, TRT)
    if needs is not None:
        yield _planned_gpu(gpus, needs)


def _planned_gpu(gpus: list[FoundGpu], needs: Needs) -> Check:
    target = planned_gpu(needs.gpu)
    fitting = [g for g in gpus if g.stands_for(target)]
    found = f"{len(fitting)} of {needs.ranks} needed with compute capability and memory of {target.title}"
    if len(fitting) < needs.ranks:
        remedy = "use that kind of host, or plan the recipe for this one: --set tensorrt_llm.gpu=…"
        return Check("recipe: gpu", State.FAIL, found, TRT, remedy)
    free = min(g.free_bytes / g.memory_bytes for g in fitting[: needs.ranks])
    if free < 0.9:
        remedy = "end what runs on it (`nvidia-smi`): the plan counts on the whole GPU"
        return Check("recipe: gpu", State.WARN, f"{found}, only {100 * free:.0f} % free", TRT, remedy)
    return Check("recipe: gpu", State.OK, found, TRT)


def _compilers(needs: Needs | None) -> Iterator[Check]:
    """What builds engines of the tensorrt backend; one compiler is enough, that of the recipe's GPU."""
    version = installed_version("onnx")
    remedy = "pip install 'trtllm-redrafter[tensorrt-rtx]'"
    state = State.FAIL if version is None else State.OK
    yield Check("onnx", state, version or "not installed", STEPS, remedy)
    version = installed_version("onnxruntime")
    found = version or "not installed; it runs the networks of engines without the GPU they are for"
    yield Check("onnxruntime", State.OK, found, ())
    wanted = None if needs is None else choose_compiler(planned_gpu(needs.gpu), "float16").name
    versions = {name: _compiler_version(name) for name in COMPILERS}
    for name, version in versions.items():
        needed = name == wanted or (wanted is None and not any(versions.values()))
        tested = COMPILERS[name].tested
        found = version or "not installed"
        if version is not None and version != tested:
            found += f"; engines were compiled with {tested}" if tested else "; no engine has been compiled with it yet"
        state = State.FAIL if needed and version is None else State.OK
        yield Check(name, state, found, STEPS if needed else (), f"pip install 'trtllm-redrafter[{name}]'")


def _compiler_version(name: str) -> str | None:
    packages = {"tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13-bindings"), "tensorrt": ("tensorrt",)}
    return next((v for v in map(installed_version, packages[name]) if v is not None), None)


def _container() -> Check:
    inside = inside_container()
    found = "inside a container" if inside else f"not in a container; {CONTAINER} has everything that fits together"
    return Check("container", State.OK, found, ())


def _needs(needs: Needs) -> Iterator[Check]:
    parent = existing_parent(needs.output)
    free = shutil.disk_usage(parent).free
    found = f"{free / 1e9:.1f} GB free in {parent}, {needs.disk_bytes / 1e9:.1f} GB needed for checkpoint and engine"
    enough = free >= needs.disk_bytes
    yield Check("recipe: disk", State.OK if enough else State.FAIL, found, BACKENDS, "choose another work_dir")
    yield _main_memory(needs)
    if needs.ranks > 1:
        yield from _several_ranks()


def _main_memory(needs: Needs) -> Check:
    memory = main_memory()
    whose = "" if memory.limit is None else f" (of {memory.total / 1e9:.1f} GB, limited by container or job)"
    found = (
        f"{memory.usable / 1e9:.1f} GB{whose}, {memory.free / 1e9:.1f} GB free, about {needs.host_bytes / 1e9:.1f} GB "
        f"needed to build {needs.workers} rank(s) at a time"
    )
    if memory.usable < needs.host_bytes:
        remedy = "use more memory, or fewer tensorrt_llm.workers; the process would be killed without a message"
        return Check("recipe: memory", State.FAIL, found, TRT, remedy)
    remedy = "end what else runs here before building; the process would be killed without a message"
    return Check("recipe: memory", State.OK if memory.free >= needs.host_bytes else State.WARN, found, TRT, remedy)


def _several_ranks() -> Iterator[Check]:
    """What is needed to start one engine process per GPU, besides libmpi."""
    starters = ("srun", "mpirun") if "SLURM_JOB_ID" in os.environ else ("mpirun",)
    path = next((path for name in starters if (path := find_program(name)) is not None), None)
    remedy = "apt-get install openmpi-bin; without it only tensorrt_llm.api: llm can run the engine"
    yield Check("recipe: mpirun", State.OK if path is not None else State.WARN, str(path or "not on PATH"), TRT, remedy)
    size = shared_memory_bytes()
    if inside_container() and size is not None and size < _SHARED_MEMORY:
        found = f"{size / 1e6:.0f} MB in /dev/shm"
        remedy = "start the container with --ipc host or --shm-size 1g; NCCL fails or hangs without"
        yield Check("recipe: shared memory", State.WARN, found, TRT, remedy)
