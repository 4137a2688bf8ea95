"""Is this host able to build the plan's engine? Everything that is missing, at once, before the child is started."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trtllm_redrafter.backends.tensorrt_llm.build_plan import TensorRTLLMBuildPlan
from trtllm_redrafter.backends.tensorrt_llm.machine import (
    FoundGpu,
    cuda_version,
    find_gpus,
    find_program,
    installed_version,
)
from trtllm_redrafter.backends.tensorrt_llm.versions import CONTAINER, same_line
from trtllm_redrafter.errors import BackendError, Problem, raise_together
from trtllm_redrafter.paths import existing_parent
from trtllm_redrafter.planning.memory import weight_bytes

PROGRAM = "trtllm-build"


@dataclass(frozen=True)
class BuildHost:
    """The program, the GPU it compiles for, and the versions that go into the engine's identity."""

    program: Path
    gpu: FoundGpu
    versions: Mapping[str, str]


def check_build_host(plan: TensorRTLLMBuildPlan) -> BuildHost:
    """`BackendError` with every reason why this host cannot build."""
    program, version, gpus = find_program(PROGRAM), installed_version("tensorrt_llm"), find_gpus()
    problems = [*_software(plan, program, version), *_gpus(plan, gpus), *_disk(plan)]
    raise_together(BackendError, problems, "this machine cannot build the engine", remedy=f"use {CONTAINER}")
    assert program is not None and version is not None
    versions = {"tensorrt_llm": version}
    for name, found in (("tensorrt", installed_version("tensorrt")), ("cuda", cuda_version())):
        if found is not None:
            versions[name] = found
    return BuildHost(program, gpus[0], versions)


def _software(plan: TensorRTLLMBuildPlan, program: Path | None, version: str | None) -> list[Problem]:
    found = []
    wanted = plan.settings.version
    if program is None:
        found.append(Problem(f"{PROGRAM} is not installed", None, "it comes with tensorrt_llm", f"use {CONTAINER}"))
    if version is None:
        found.append(Problem("tensorrt_llm is not installed", None, None, f"use {CONTAINER}"))
    elif not same_line(version, wanted):
        remedy = f"use {CONTAINER}, or plan for it with tensorrt_llm.version={version}"
        found.append(Problem(f"tensorrt_llm {version} is installed, the plan is for {wanted}", None, None, remedy))
    return found


def _gpus(plan: TensorRTLLMBuildPlan, gpus: list[FoundGpu]) -> list[Problem]:
    target = plan.target
    if not gpus:
        return [Problem("there is no NVIDIA GPU here", None, "an engine is compiled on the GPU that will run it",
                        "build on the GPU host; `--dry-run` and `plan` work anywhere")]  # fmt: skip
    found = []
    first = gpus[0]
    if first.compute_capability != target.compute_capability:
        why = f"engines run on the compute capability they were built on, {target.title} is another"
        found.append(Problem(f"the GPU is {first.name}", None, why, f"pass --gpu for {first.name}, or use that GPU"))
    elif not first.stands_for(target):
        why = f"it has {first.memory_bytes / 1e9:.0f} GB, {target.title} is planned for"
        found.append(Problem(f"the GPU is {first.name}", None, why, "pass --gpu for the GPU that is here"))
    weights = weight_bytes(plan.config).total
    if first.free_bytes < weights:
        why = f"{first.free_bytes / 1e9:.1f} GB are free, the weights of a rank alone are {weights / 1e9:.1f} GB"
        remedy = "end what runs on it (`nvidia-smi`), or hide it: CUDA_VISIBLE_DEVICES"
        found.append(Problem(f"the GPU {first.name} is in use", None, why, remedy))
    names = {gpu.name for gpu in gpus}
    if plan.config.tp_size > 1 and len(names) > 1:
        found.append(
            Problem(f"the GPUs differ: {', '.join(sorted(names))}", None, None, "hide some: CUDA_VISIBLE_DEVICES")
        )
    return found


def _disk(plan: TensorRTLLMBuildPlan) -> list[Problem]:
    parent = existing_parent(plan.options.output)
    needed, free = plan.config.tp_size * weight_bytes(plan.config).total, shutil.disk_usage(parent).free
    if needed <= free:
        return []
    why = f"about {needed:,} bytes are needed, {free:,} are free"
    return [Problem("there is not enough disk space for the engine", str(parent), why, "choose another --output")]
