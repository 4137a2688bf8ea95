"""The tensorrt-llm backend: plan anywhere, build and run on a GPU host.

An engine is opened only after every reason why it could not run here has been looked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

from trtllm_redrafter.backends.base import BuildOptions, BuildPlan, EngineInfo
from trtllm_redrafter.backends.engine_config import TENSORRT, EngineConfig
from trtllm_redrafter.backends.tensorrt_llm.build_plan import TensorRTLLMBuildPlan, plan_build
from trtllm_redrafter.backends.tensorrt_llm.client import EngineClient
from trtllm_redrafter.backends.tensorrt_llm.engine_dir import EngineDirectory, read_engine
from trtllm_redrafter.backends.tensorrt_llm.executor_client import ExecutorClient
from trtllm_redrafter.backends.tensorrt_llm.machine import FoundGpu, find_gpus, installed_version
from trtllm_redrafter.backends.tensorrt_llm.options import APIS, Api
from trtllm_redrafter.backends.tensorrt_llm.remote_client import RemoteClient
from trtllm_redrafter.backends.tensorrt_llm.runner import TensorRTRunner
from trtllm_redrafter.backends.tokenizer import engine_text
from trtllm_redrafter.checkpoint.names import EOS_TOKEN_IDS
from trtllm_redrafter.errors import BackendError, Problem, UsageError, raise_together
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.redrafter.config import DraftShape


class TensorRTLLMBackend:
    """Builds with `trtllm-build` in a child process, runs through the executor's Python bindings or the LLM API."""

    name = TENSORRT

    def plan(self, options: BuildOptions) -> TensorRTLLMBuildPlan:
        """Flags, memory, warnings; every refusal at once. Needs neither TensorRT-LLM nor a GPU."""
        return plan_build(options)

    def build(self, plan: BuildPlan, progress: Progress, *, on_complete: Callable[[Path], None] | None = None) -> Path:
        """Build the engine directory; it appears complete or not at all."""
        from trtllm_redrafter.backends.tensorrt_llm.builder import build_engine  # imports torch

        assert isinstance(plan, TensorRTLLMBuildPlan)
        return build_engine(plan, progress, on_complete=on_complete)

    def load(
        self,
        engine: Path | EngineConfig,
        *,
        device: str,
        verify_hashes: bool,
        draft_shape: DraftShape | None = None,
        api: str | None = None,
        kv_cache_tokens: int | None = None,
    ) -> TensorRTRunner:
        """Open an engine on this host. A `draft_shape` other than the engine's is refused: it is compiled in."""
        found = read_engine(engine, verify_hashes=verify_hashes)
        chosen = api or found.runtime.api
        index = _device_index(device, found)
        gpus = find_gpus()
        problems = [
            *_api_problems(chosen), *_shape_problems(found, draft_shape), *_machine_problems(found, gpus, index)
        ]  # fmt: skip
        raise_together(BackendError, problems, "the engine cannot run here", where=found.path)
        info = _info(found, gpus[index or 0])
        tokenizer, ends = engine_text(
            found.path, vocab_size=info.vocab_size, recorded=found.notes.get(EOS_TOKEN_IDS, ())
        )
        client = _client(found, cast(Api, chosen), index, kv_cache_tokens)  # last: nothing may fail while it holds GPUs
        return TensorRTRunner(info, client, tokenizer, ends, greedy=found.greedy)


def _client(engine: EngineDirectory, api: Api, device: int | None, kv_cache_tokens: int | None) -> EngineClient:
    """In this process only if that starts none by MPI: the bindings on one GPU."""
    if api == "executor" and engine.world_size == 1:
        return ExecutorClient(
            engine.path,
            has_drafter=engine.draft_shape is not None,
            runtime=engine.runtime,
            device=device,
            kv_cache_tokens=kv_cache_tokens,
        )
    return RemoteClient(engine.path, engine.world_size, api=api, device=device, kv_cache_tokens=kv_cache_tokens)


def _info(engine: EngineDirectory, gpu: FoundGpu) -> EngineInfo:
    config = engine.config
    count = f"{engine.world_size} x " if engine.world_size > 1 else ""
    return EngineInfo(
        path=engine.path,
        backend=TENSORRT,
        device=f"{count}{gpu.name}",
        dtype=config.model.dtype,
        vocab_size=config.model.vocab_size,
        max_batch_size=config.limits.max_batch_size,
        max_input_len=config.limits.max_input_len,
        max_seq_len=config.max_seq_len,
        draft_shape=engine.draft_shape,
    )


def _device_index(device: str, engine: EngineDirectory) -> int | None:
    """`cuda:1` → 1; None leaves the choice to TensorRT-LLM."""
    match = re.fullmatch(r"(?:auto|cuda(?::(\d+))?)", device)
    if match is None:
        remedy = "pass --device cuda or cuda:N; an engine for the CPU is built with --backend torch"
        raise UsageError(f"a TensorRT engine does not run on {device!r}", where=engine.path, remedy=remedy)
    if match.group(1) is not None and engine.world_size > 1:
        why = f"the engine takes {engine.world_size} GPUs"
        raise UsageError(f"--device {device} names one GPU", where=engine.path, why=why, remedy="pass --device cuda")
    return None if match.group(1) is None else int(match.group(1))


def _api_problems(api: str) -> list[Problem]:
    """An engine directory may come from a later version, or have been edited."""
    if api in APIS:
        return []
    remedy = f"pass --api {' or --api '.join(APIS)}, or build it again"
    return [Problem(f"there is no interface {api!r}", None, None, remedy)]


def _shape_problems(engine: EngineDirectory, asked: DraftShape | None) -> list[Problem]:
    if asked is None or asked == engine.draft_shape:
        return []
    own = engine.draft_shape
    what = f"{asked.num_beams} beams x {asked.draft_len} tokens were asked for"
    why = "the engine has no drafter" if own is None else f"it was built for {own.num_beams} x {own.draft_len}"
    remedy = "leave --num-beams and --draft-len out, or convert and build again with them"
    return [Problem(what, None, why, remedy)]


def _machine_problems(engine: EngineDirectory, gpus: list[FoundGpu], index: int | None) -> list[Problem]:
    found, built_on = [], engine.notes.get("gpu", {})
    installed = installed_version("tensorrt_llm")
    if installed is None:
        found.append(Problem("tensorrt_llm is not installed", None, None, f"use release {engine.config.version}"))
    elif installed.split("+")[0] != engine.config.version.split("+")[0]:
        why = "a TensorRT engine runs with the release that built it only"
        remedy = f"install {engine.config.version}, or build the engine again"
        found.append(Problem(f"the engine is of {engine.config.version}, installed is {installed}", None, why, remedy))
    tensorrt, built_with = installed_version("tensorrt"), engine.tensorrt
    if None not in (tensorrt, built_with) and tensorrt != built_with:
        what = f"the engine was compiled by TensorRT {built_with}, installed is {tensorrt}"
        found.append(Problem(what, None, "compiled engines load in that version only", "build the engine again"))
    if not gpus:
        found.append(Problem("there is no NVIDIA GPU here", None, None, "run it on a GPU host"))
    elif len(gpus) < engine.world_size or (index is not None and index >= len(gpus)):
        needs = engine.world_size if index is None else index + 1
        found.append(Problem(f"{needs} GPU(s) are needed, {len(gpus)} are here", None, None, "use another host"))
    else:
        capability = tuple(built_on.get("compute_capability", ()))
        used = gpus[: engine.world_size] if index is None else [gpus[index]]
        others = sorted({gpu.name for gpu in used if capability and gpu.compute_capability != capability})
        if others:
            why = f"it was built on {built_on.get('name')}"
            what = f"the engine is not for {', '.join(others)}"
            found.append(Problem(what, None, why, "build it on this kind of GPU; CUDA_VISIBLE_DEVICES hides others"))
    return found
