"""Options of the tensorrt-llm backend beyond the common build options; the recipe has the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

FlagSetting = str | int | bool
Api = Literal["executor", "llm"]
"""TensorRT-LLM's interface for requests: the executor's Python bindings, or the LLM API on top of them."""

APIS: tuple[Api, ...] = get_args(Api)


@dataclass(frozen=True)
class RuntimeOptions:
    """How an engine will be executed; kept in the engine directory, so that `run` needs no second set of options."""

    kv_cache_fraction: float
    block_reuse: bool
    multi_block_mode: bool
    api: Api = "executor"
    """Engines written before this choice existed have none; they are executed through the bindings."""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class TensorRTLLMOptions:
    """The recipe's `tensorrt_llm` section. None means derived, as the flag plan shows."""

    version: str
    gpu: str
    gemm_plugin: str | None
    max_num_tokens: int | None
    opt_batch_size: int | None
    allow_sampling: bool
    flags: Mapping[str, FlagSetting]
    workers: int
    cache: bool
    cache_dir: Path
    runtime: RuntimeOptions
    origins: Mapping[str, str]
    """Option → where its value came from (`flag --max-batch-size`, `preset h100-latency`, `default`)."""

    def origin(self, key: str) -> str:
        return self.origins.get(key, "given")
