"""Known ways in which building, loading or running fails, by the message, with what it means and what to do.

TensorRT reports a lack of memory as a missing implementation, and TensorRT-LLM a missing kernel as a failed C++
assertion: the messages mislead. The table is searched in order; the first row that matches explains.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import BackendError, SomeError

_TAIL_LINES = 12
_LONGEST = 500
DOCTOR = "run `trtllm-redrafter doctor`"


@dataclass(frozen=True)
class Failure:
    """One row: a pattern of the log, what it means, and the remedy."""

    name: str
    pattern: re.Pattern[str]
    what: str
    remedy: str


def _failure(name: str, pattern: str, what: str, remedy: str) -> Failure:
    return Failure(name, re.compile(pattern, re.IGNORECASE), what, remedy)


_KILLED_WHY = "the system ends processes like this when the main memory is used up"
_KILLED = _failure(
    "killed", r"BrokenProcessPool|process in the process pool was terminated abruptly",
    "trtllm-build was killed",
    "build fewer ranks at once (tensorrt_llm.workers), or give the host or container more memory",
)  # fmt: skip

FAILURES: tuple[Failure, ...] = (
    _KILLED,
    _failure(
        "missing-kernel", r"No available XQA kernels are found for speculative decoding"
        r"|Head size \d+ is not supported by MMHA",
        "no attention kernel verifies draft tokens for these heads",
        "build with KV blocks of 32 tokens, another KV cache type or another number of ranks; `plan` has the rules",
    ),
    _failure(
        "version", r"(engine|plan).{0,60}(version|built|compiled).{0,80}(mismatch|incompatible|different|expecting)"
        r"|Serialization .*version|incompatible with this version",
        "the engine was made by another TensorRT version than this one",
        "build it again on this host, or run it in the container that built it",
    ),
    _failure(
        "wrong-sm", r"no kernel image is available|compute capability.{0,60}(not supported|mismatch)"
        r"|different models of devices|generated on an incompatible device",
        "the engine was made for another kind of GPU",
        "build it on the kind of GPU that will run it",
    ),
    _failure(
        "gpu-memory", r"CUDA out of memory|OutOfMemory|cudaErrorMemoryAllocation|Cuda Runtime \(out of memory\)"
        r"|Requested amount of GPU memory .* could not be allocated|GPU memory is insufficient",
        "the GPU has not enough free memory",
        "see that nothing else runs on it (`nvidia-smi`), lower build.max_batch_size, build.max_seq_len or the tree, "
        "or use more ranks; `plan` shows what takes the memory",
    ),
    _failure(
        "no-implementation", r"Could not find any implementation for node",
        "TensorRT found no way to run a layer; most often every one it tried wanted more memory than was free",
        "free the GPU, lower tensorrt_llm.max_num_tokens and build.max_batch_size, then build again",
    ),
    _failure(
        "plugin", r"(getPluginCreator|plugin).{0,80}(could not find|not found|failed to (load|initialize))"
        r"|libnvinfer_plugin_tensorrt_llm\.so",
        "TensorRT-LLM's plugin library does not load",
        "TensorRT and TensorRT-LLM versions do not fit: run `trtllm-redrafter doctor`, or use the release container",
    ),
    _failure(
        "beam-width", r"broadcast.{0,200}batch_size_beam_width|batch_size_beam_width.{0,200}broadcast",
        "draft tokens and a beam width other than 1 do not go together",
        "remove max_beam_width from tensorrt_llm.flags",
    ),
    _failure(
        "missing-tensors", r"Required but not provided tensors",
        "the checkpoint lacks tensors of the model class",
        "convert again; `trtllm-redrafter verify CHECKPOINT` lists what is missing",
    ),
    _failure(
        "wrong-dtype", r"(type|dtype) mismatch|must have (the )?same (data )?type|incompatible types"
        r"|elementwise.*types? .*(differ|mismatch)",
        "tensors of different types meet in the graph",
        "a tensor of the checkpoint has the wrong dtype: run `trtllm-redrafter verify CHECKPOINT`",
    ),
    _failure(
        "mpi-spawn", r"MPI_ERR_SPAWN|could not spawn processes",
        "the LLM API cannot start processes by MPI on this host",
        "pass --api executor to `run`, or build with tensorrt_llm.api: executor, which needs none",
    ),
    _failure(
        "mpi", r"libmpi\.so|ORTE was unable|There are not enough slots|MPI_Init",
        "MPI does not work on this host",
        "install libopenmpi (libmpi.so.40), or use the release container; for slots, pass as many GPUs as ranks",
    ),
    _failure(
        "slurm-pmi", r"direct launched using .{0,2}srun|OMPI was not built with SLURM",
        "MPI believes that Slurm has started this process, and was not built for that",
        "start the program from a batch script or with `srun --mpi=pmix`, not inside a plain srun step",
    ),
    _failure(
        "nccl", r"ncclSystemError|ncclUnhandledCudaError|NCCL error|unhandled (system|cuda) error",
        "the GPUs cannot reach each other",
        "in a container, give it shared memory (--ipc host, or --shm-size 1g); NCCL_DEBUG=WARN says more",
    ),
    _failure(
        "cuda-library", r"(libcublasLt|libcudart|libnvinfer|libcuda)[\w.]*: cannot open shared object file"
        r"|CUDA driver version is insufficient",
        "a CUDA library or a new enough driver is missing",
        "use the release container, or install the CUDA 13 libraries and driver that TensorRT-LLM 1.2 needs",
    ),
    _failure(
        "disk", r"No space left on device|Disk quota exceeded",
        "the disk is full",
        "an engine takes as much space as the checkpoint: free some, or choose another --output",
    ),
    _failure(
        "unknown-flag", r"unrecognized arguments|invalid choice",
        "this trtllm-build does not know a flag or value",
        "its version differs from tensorrt_llm.version: run `trtllm-redrafter doctor`",
    ),
)  # fmt: skip


def explain(text: str) -> Failure | None:
    """The table's row for a log or message; None when nothing is recognised."""
    return next((failure for failure in FAILURES if failure.pattern.search(text)), None)


def build_error(code: int, log: Path) -> BackendError:
    """What to raise when trtllm-build ended with `code`."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    if code == -signal.SIGKILL or code == 128 + signal.SIGKILL:  # whatever TensorRT warned of before
        return BackendError(_KILLED.what, where=log, why=_KILLED_WHY, remedy=_KILLED.remedy)
    known = explain(text)
    if known is not None:
        line = next((row.strip() for row in text.splitlines() if known.pattern.search(row)), "")
        return BackendError(known.what, where=log, why=line[:300] or None, remedy=known.remedy)
    tail = "\n".join(text.splitlines()[-_TAIL_LINES:]) or "it wrote nothing"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return BackendError(f"trtllm-build failed with {how}", where=log, why=tail, remedy="read the log")


def explained(
    what: str, message: str, remedy: str, *, where: Path | str | None = None, kind: type[SomeError]
) -> SomeError:
    """The error for a message of TensorRT-LLM: as the table explains it, else with this `what` and `remedy`."""
    known = explain(message)
    if known is not None:
        what, remedy = known.what, known.remedy
    return kind(what, where=where, why=message[:_LONGEST], remedy=remedy)


def import_library(module: str) -> Any:
    """A module of tensorrt_llm, by name and only when a client is made: importing it takes half a minute.

    A mismatch of CUDA, MPI or torch shows as any kind of error while it is imported.
    """
    try:
        return import_module(module)
    except Exception as error:
        raise explained(f"{module} cannot be imported", _text(error), DOCTOR, kind=BackendError) from error


def load_error(engine: Path, error: Exception, remedy: str) -> BackendError:
    """What to raise when the engine did not load; `remedy` is for messages that are not in the table."""
    return explained("the engine cannot be loaded", _text(error), remedy, where=engine, kind=BackendError)


def run_error(error: Exception) -> BackendError:
    """What to raise when a loaded engine fails as a whole."""
    remedy = "load it again; where it fails again, " + DOCTOR
    return explained("the engine has failed while running", _text(error), remedy, kind=BackendError)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
