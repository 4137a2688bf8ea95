"""What a measurement depends on besides the engine: machine, clocks, load, versions, commit, command, memory.

A figure without these cannot be compared with another. The host's name is left out: results are published.
"""

from __future__ import annotations

import datetime
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import EngineInfo
from trtllm_redrafter.backends.engine_config import read_engine_config
from trtllm_redrafter.backends.tensorrt_llm.machine import installed_version, query_gpus
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.planning.gpus import gpu_by_driver_name
from trtllm_redrafter.planning.memory import weight_bytes
from trtllm_redrafter.version import __version__

_PACKAGES = ("torch", "transformers", "numpy", "tensorrt_llm", "tensorrt")
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "REDRAFTER_THREADS", "REDRAFTER_NATIVE", "CUDA_VISIBLE_DEVICES")


def describe(info: EngineInfo, command: Sequence[str]) -> dict[str, Any]:
    """The environment before the measurement."""
    versions = {name: found for name in _PACKAGES if (found := installed_version(name)) is not None}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "commit": _commit(),
        "versions": {"trtllm-redrafter": __version__, "python": platform.python_version(), **versions},
        "machine": machine(info),
        "clocks": clocks(info),
        "load_before": _load(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def afterwards(info: EngineInfo) -> dict[str, Any]:
    """The environment after the measurement: clocks, load, and the memory used."""
    return {"clocks_after": clocks(info), "load_after": _load(), "memory": memory(info)}


def machine(info: EngineInfo) -> dict[str, Any]:
    found: dict[str, Any] = {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "device": info.device,
    }
    name = _gpu_name(info)
    return found if name is None else {**found, "gpu": name}


def _gpu_name(info: EngineInfo) -> str | None:
    """The GPU's name as the driver reports it; a TensorRT-LLM engine's device is `2 x NAME`, or the name alone."""
    if info.backend == "tensorrt-llm":
        return info.device.rpartition(" x ")[2]
    if not _on_cuda(info):
        return None
    import torch

    return torch.cuda.get_device_name(_cuda_device(info))


def _cuda_device(info: EngineInfo) -> str:
    """ "cuda:1" of "cuda:1 (cuda-graphs: ...)"."""
    return info.device.partition(" ")[0]


def _on_cuda(info: EngineInfo) -> bool:
    return info.device.startswith("cuda")


def _cpuinfo(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def clocks(info: EngineInfo) -> dict[str, Any]:
    """Current MHz of the first core and its governor, None if not known; and the clocks of the GPUs."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    megahertz = _cpuinfo("cpu MHz")
    found: dict[str, Any] = {
        "mhz": None if megahertz is None else round(float(megahertz)),
        "governor": governor.read_text().strip() if governor.exists() else None,
    }
    on_gpu = info.backend == "tensorrt-llm" or _on_cuda(info)
    return {**found, "gpus": gpu_clocks()} if on_gpu else found


def gpu_clocks() -> list[dict[str, str]]:
    """Current MHz of each GPU's cores and memory, and the cores' maximum; [] if the driver does not report them."""
    names = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "clocks.max.sm": "max_sm_mhz"}
    return [dict(zip(names.values(), values, strict=True)) for values in query_gpus(*names)]


def _load() -> float | None:
    """Mean number of runnable processes over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _commit() -> str | None:
    """Commit of the source tree the package runs from, marked if modified; None if it is not a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def memory(info: EngineInfo) -> dict[str, int]:
    """Peak bytes of this process since its start, and PyTorch's peak on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if _on_cuda(info):
        import torch

        found["peak_gpu_bytes"] = int(torch.cuda.max_memory_allocated(_cuda_device(info)))
    return found


def roof(info: EngineInfo) -> dict[str, Any]:
    """Bytes of base weights that a step reads, and the bandwidth of their memory in bytes per second."""
    config = read_engine_config(info.path)
    nbytes = weight_bytes(CheckpointConfig.from_dict(config.model_values, where=config.model_file)).base
    name = _gpu_name(info)
    if name is None:
        return {"weight_bytes": nbytes, "bandwidth": _bandwidth(nbytes), "bandwidth_from": "measured on this machine"}
    row = gpu_by_driver_name(name)
    source = None if row is None else f"data sheet of {row.title}"
    return {"weight_bytes": nbytes, "bandwidth": None if row is None else row.bandwidth, "bandwidth_from": source}


def _bandwidth(nbytes: int) -> float:
    """Bytes per second of reading that many bytes (64 MiB to 1 GiB) with all cores; the best of ten runs."""
    import torch

    size = max(2**26, min(nbytes, 2**30))
    before, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before)
    try:
        buffer = torch.ones(size // 8, dtype=torch.int64)
        for _ in range(10):
            start = time.perf_counter()
            buffer.sum()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return size / best
