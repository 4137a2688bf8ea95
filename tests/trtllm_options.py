"""Options and configs for tests of the tensorrt-llm backend: plausible models, no files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.tensorrt_llm.options import RuntimeOptions, TensorRTLLMOptions
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape


def model_config(architecture: str = "LlamaForCausalLM", *, drafter: bool = True, **changes: Any) -> CheckpointConfig:
    """A small LLaMA-like model with a 3 x 4 drafter; `changes` replace fields."""
    raw = {
        "architecture": architecture, "dtype": "bfloat16", "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "head_size": 64,
        "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    config = CheckpointConfig.from_dict(raw, where="test")
    if drafter:
        sizes = DrafterConfig(vocab_size=32000, hidden_size=1024, exit_dim=2048, num_layers=2)
        config = config.with_drafter(sizes, DraftShape(3, 4), greedy=config.greedy)
    return replace(config, **changes)


def settings(**changes: Any) -> TensorRTLLMOptions:
    runtime = RuntimeOptions(kv_cache_fraction=0.9, block_reuse=False, multi_block_mode=True)
    values = TensorRTLLMOptions(
        version="1.2.1", gpu="h100-80gb", gemm_plugin=None, max_num_tokens=None, opt_batch_size=None,
        allow_sampling=False, flags={}, workers=1, cache=False, cache_dir=Path("cache"), runtime=runtime,
        origins={"max_batch_size": "flag --max-batch-size"},
    )  # fmt: skip
    return replace(values, **changes)


def options(trt: TensorRTLLMOptions | None = None, **changes: Any) -> BuildOptions:
    values = BuildOptions(
        checkpoint=Path("checkpoint"), output=Path("engine"), backend="tensorrt-llm", tokenizer=None,
        max_batch_size=8, max_input_len=1024, max_seq_len=2048, overwrite=False, tensorrt_llm=trt or settings(),
    )  # fmt: skip
    return replace(values, **changes)
