"""Build and load engines of the tensorrt backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from trtllm_redrafter.backends.base import BuildOptions, BuildPlan, EngineInfo
from trtllm_redrafter.backends.engine_config import TENSORRT_STEPS, EngineConfig, read_engine_config
from trtllm_redrafter.backends.tensorrt.build import build_engine
from trtllm_redrafter.backends.tensorrt.build_plan import TensorRTBuildPlan, plan_build
from trtllm_redrafter.backends.tensorrt.decoder import Decoder, Program, Programs
from trtllm_redrafter.backends.tensorrt.engine import CompiledEngine, network_of, open_engine
from trtllm_redrafter.backends.tensorrt.execution import make_programs
from trtllm_redrafter.backends.tensorrt.networks import Network
from trtllm_redrafter.backends.tensorrt.ort import OnnxProgram, onnxruntime
from trtllm_redrafter.backends.tensorrt.runner import StepRunner
from trtllm_redrafter.backends.tensorrt.weights import draft_rows, load_inputs
from trtllm_redrafter.backends.tokenizer import engine_text
from trtllm_redrafter.errors import BackendError
from trtllm_redrafter.memory import memory_for
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.redrafter.config import DraftShape

ONNXRUNTIME = "onnxruntime"


class TensorRTBackend:
    """TensorRT's compilers, without TensorRT-LLM."""

    name = TENSORRT_STEPS

    def plan(self, options: BuildOptions) -> TensorRTBuildPlan:
        """Check everything a build could fail on."""
        return plan_build(options)

    def build(self, plan: BuildPlan, progress: Progress, *, on_complete: Callable[[Path], None] | None = None) -> Path:
        """Compile and write the engine directory; it appears complete or not at all."""
        assert isinstance(plan, TensorRTBuildPlan)
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
    ) -> StepRunner:
        """`api` is the executor: None for the engine's compiler, or "onnxruntime" on any device.

        With onnxruntime, which compiles nothing, `draft_shape` may differ from the engine's.
        """
        del kv_cache_tokens  # the cache has the size the engine was built with
        config = read_engine_config(engine, backend=TENSORRT_STEPS)
        on_onnx = api == ONNXRUNTIME
        found = open_engine(config, draft_shape, verify_hashes, shape_is_free=on_onnx)
        if on_onnx:
            target = _onnx_device(device)
            make = _onnx_programs(found, target)
        else:
            target = torch.device("cuda" if device in ("auto", "cpu") else device)
            make = make_programs(found, target)
        limits, model = config.limits, found.checkpoint.config
        remedy = "build with a smaller --max-batch-size or --max-seq-len"
        with memory_for("the KV cache", why=str(target), remedy=remedy):
            decoder = Decoder(found.sizes, Programs(make, {}), max_batch_size=limits.max_batch_size, device=target)
        tokenizer, ends = engine_text(config.path, vocab_size=model.vocab_size, recorded=config.eos_token_ids or ())
        info = EngineInfo(
            path=config.path,
            backend=TENSORRT_STEPS,
            device=f"{target} ({ONNXRUNTIME if on_onnx else found.file.compiler.name})",
            dtype=model.dtype,
            vocab_size=model.vocab_size,
            max_batch_size=limits.max_batch_size,
            max_input_len=limits.max_input_len,
            max_seq_len=limits.max_seq_len,
            draft_shape=found.sizes.draft,
        )
        return StepRunner(info, decoder, tokenizer, ends)


def _onnx_device(name: str) -> torch.device:
    """CUDA where PyTorch and onnxruntime both have it, unless something else is asked for."""
    able = torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime().get_available_providers()
    if name == "auto":
        return torch.device("cuda" if able else "cpu")
    if name.startswith("cuda") and not able:
        remedy = "use --device cpu, or install onnxruntime-gpu on a host with a GPU"
        raise BackendError("onnxruntime cannot use a GPU here", remedy=remedy)
    return torch.device(name)


def _onnx_programs(engine: CompiledEngine, device: torch.device) -> Callable[[bool, bool], Program]:
    rows = draft_rows(engine.checkpoint, engine.sizes.draft_rows or 0)
    weights: dict[str, torch.Tensor] = {}

    def make(drafted: bool, sampled: bool) -> Program:
        model = network_of(engine, Network(drafted, sampled))
        if not weights:
            with memory_for("the weights", why=str(device), remedy="use a device with more"):
                weights.update(load_inputs(engine.checkpoint, rows, device))
        return OnnxProgram(model, weights, device)

    return make
