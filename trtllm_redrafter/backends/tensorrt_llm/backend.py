"""The tensorrt-llm backend: plan anywhere, build and run on a GPU host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trtllm_redrafter.backends.base import BuildOptions, BuildPlan, Runner
from trtllm_redrafter.backends.engine_config import TENSORRT, EngineConfig
from trtllm_redrafter.backends.tensorrt_llm.build_plan import TensorRTPlan, plan_build
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.redrafter.config import DraftShape


class TensorRTBackend:
    """Builds with `trtllm-build` in a child process, runs through the executor's Python bindings or the LLM API."""

    name = TENSORRT

    def plan(self, options: BuildOptions) -> TensorRTPlan:
        """Flags, memory, warnings; every refusal at once. Needs neither TensorRT-LLM nor a GPU."""
        return plan_build(options)

    def build(self, plan: BuildPlan, progress: Progress, *, on_complete: Callable[[Path], None] | None = None) -> Path:
        """Build the engine directory; it appears complete or not at all."""
        from trtllm_redrafter.backends.tensorrt_llm.builder import build_engine

        assert isinstance(plan, TensorRTPlan)
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
    ) -> Runner:
        """Open an engine on this host; a TensorRT engine has its draft shape baked in."""
        from trtllm_redrafter.backends.tensorrt_llm.loading import load_runner

        return load_runner(
            engine,
            device=device,
            verify_hashes=verify_hashes,
            draft_shape=draft_shape,
            api=api,
            kv_cache_tokens=kv_cache_tokens,
        )
