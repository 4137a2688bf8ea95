"""What this machine has, found without importing anything heavy: installed versions, GPUs, programs.

Importing tensorrt_llm takes half a minute and fails in obscure ways when versions do not fit, so versions are read from
package metadata, and GPUs from `nvidia-smi`.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from trtllm_redrafter.planning.gpus import Gpu, gpu_by_driver_name

_QUERY = ("name", "memory.total", "memory.free", "compute_cap", "driver_version")
_TIMEOUT_SECONDS = 20
MEMORY_TOLERANCE = 0.95
"""A driver may report a little less than the data sheet: some memory is reserved."""


@dataclass(frozen=True)
class FoundGpu:
    """One GPU as the driver describes it; memory in bytes."""

    name: str
    memory_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    driver: str

    @property
    def kind(self) -> Gpu | None:
        """The row of the planning table, for a GPU that is in it."""
        return gpu_by_driver_name(self.name)

    def stands_for(self, target: Gpu) -> bool:
        """Does it run what is planned for `target`: the same compute capability, and no less memory?"""
        enough = self.memory_bytes >= MEMORY_TOLERANCE * target.memory_bytes
        return self.compute_capability == target.compute_capability and enough

    @property
    def sm(self) -> str:
        return f"sm_{self.compute_capability[0]}{self.compute_capability[1]}"


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, not imported; None when it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def query_gpus(*names: str) -> list[list[str]]:
    """Values that `nvidia-smi` has for each GPU, by its names; [] if there is no driver or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    lines = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [line for line in lines if len(line) == len(names)]


def find_gpus() -> list[FoundGpu]:
    """GPUs by `nvidia-smi`; [] where there is no driver or it does not answer."""
    found = [gpu for values in query_gpus(*_QUERY) if (gpu := _parse(values)) is not None]
    return _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _visible(gpus: list[FoundGpu], chosen: str | None) -> list[FoundGpu]:
    """What CUDA will see: `nvidia-smi` lists all, CUDA those of the variable, in its order, up to an invalid one."""
    if chosen is None or any(not part.strip().lstrip("-").isdigit() for part in chosen.split(",") if part.strip()):
        return gpus  # not set, or named by UUID: the driver's list is the best there is
    seen = []
    for part in chosen.split(","):
        index = int(part) if part.strip() else -1
        if not 0 <= index < len(gpus):
            break
        seen.append(gpus[index])
    return seen


def _parse(values: list[str]) -> FoundGpu | None:
    """["NVIDIA H100 80GB HBM3", "81559", "81000", "9.0", "580.82.07"]; MiB. Other values are ignored."""
    try:
        name, total, free, capability, driver = values
        major, _, minor = capability.partition(".")
        return FoundGpu(name, int(total) * 2**20, int(free) * 2**20, (int(major), int(minor)), driver)
    except ValueError:
        return None


def find_program(name: str) -> Path | None:
    found = shutil.which(name)
    return None if found is None else Path(found)


def find_mpi() -> str | None:
    """libmpi as the loader will find it: by the system's cache, or in LD_LIBRARY_PATH, as in containers."""
    known = ctypes.util.find_library("mpi")
    if known is not None:
        return known
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("libmpi.so*"))]
    return str(found[0]) if found else None


def cuda_version() -> str | None:
    """CUDA runtime that the installed wheels bring; None when none is installed as a package."""
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12"):
        version = installed_version(package)
        if version is not None:
            return version
    return None
