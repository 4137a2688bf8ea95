"""The flags of `trtllm-build` that may be passed for our models: their kinds and legal values.

`trtllm-build` refuses a mistyped flag only after it has been started on the GPU host, and takes some legal ones without
effect. This table lets a plan refuse them first. A test compares it with the documented interface, flag by flag.

    FLAGS["gemm_plugin"].problem("fp16")    # 'auto', 'float16', ... are its values
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

INT, TEXT, SWITCH = "int", "text", "switch"
CHOICE = "choice"

_ON_OFF = ("enable", "disable")
_DTYPE_PLUGIN = ("auto", "float16", "float32", "bfloat16", "int32", "disable")


@dataclass(frozen=True)
class BuildFlag:
    """One flag; a switch is passed alone, everything else with a value."""

    kind: str
    choices: tuple[str, ...] = ()

    def legal(self, value: str | int | bool) -> bool:
        if self.kind == SWITCH:
            return isinstance(value, bool)
        if self.kind == INT:
            return type(value) is int and value >= 0
        if self.kind == CHOICE:
            return value in self.choices
        return isinstance(value, str) and bool(value)

    @property
    def legal_values(self) -> str:
        named = {SWITCH: "true or false", INT: "a whole number", TEXT: "a text"}
        return named.get(self.kind) or ", ".join(self.choices)


def _choice(*values: str) -> BuildFlag:
    return BuildFlag(CHOICE, values)


FLAGS: Mapping[str, BuildFlag] = {
    "checkpoint_dir": BuildFlag(TEXT),
    "output_dir": BuildFlag(TEXT),
    "max_batch_size": BuildFlag(INT),
    "max_input_len": BuildFlag(INT),
    "max_seq_len": BuildFlag(INT),
    "max_beam_width": BuildFlag(INT),
    "max_num_tokens": BuildFlag(INT),
    "opt_num_tokens": BuildFlag(INT),
    "kv_cache_type": _choice("continuous", "paged", "disabled"),
    "input_timing_cache": BuildFlag(TEXT),
    "output_timing_cache": BuildFlag(TEXT),
    "profiling_verbosity": _choice("layer_names_only", "detailed", "none"),
    "strip_plan": BuildFlag(SWITCH),
    "weight_sparsity": BuildFlag(SWITCH),
    "weight_streaming": BuildFlag(SWITCH),
    "fast_build": BuildFlag(SWITCH),
    "workers": BuildFlag(INT),
    "log_level": _choice("internal_error", "error", "warning", "info", "verbose", "debug", "trace"),
    "enable_debug_output": BuildFlag(SWITCH),
    "monitor_memory": BuildFlag(SWITCH),
    "logits_dtype": _choice("float16", "float32"),
    "gather_context_logits": BuildFlag(SWITCH),
    "gather_generation_logits": BuildFlag(SWITCH),
    "gather_all_token_logits": BuildFlag(SWITCH),
    "speculative_decoding_mode": _choice(
        "draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"
    ),
    "max_draft_len": BuildFlag(INT),
    "gpt_attention_plugin": _choice(*_DTYPE_PLUGIN),
    "nccl_plugin": _choice(*_DTYPE_PLUGIN),
    "fp8_rowwise_gemm_plugin": _choice(*_DTYPE_PLUGIN),
    "gemm_plugin": _choice(*_DTYPE_PLUGIN[:-1], "fp8", "nvfp4", "disable"),
    "gemm_swiglu_plugin": _choice("fp8", "disable"),
    "low_latency_gemm_plugin": _choice("fp8", "disable"),
    "low_latency_gemm_swiglu_plugin": _choice("fp8", "disable"),
    "gemm_allreduce_plugin": _choice("float16", "bfloat16", "disable"),
    "context_fmha": _choice(*_ON_OFF),
    "remove_input_padding": _choice(*_ON_OFF),
    "use_paged_context_fmha": _choice(*_ON_OFF),
    "use_fp8_context_fmha": _choice(*_ON_OFF),
    "multiple_profiles": _choice(*_ON_OFF),
    "streamingllm": _choice(*_ON_OFF),
    "norm_quant_fusion": _choice(*_ON_OFF),
    "reduce_fusion": _choice(*_ON_OFF),
    "user_buffer": _choice(*_ON_OFF),
    "use_fused_mlp": _choice(*_ON_OFF),
    "pp_reduce_scatter": _choice(*_ON_OFF),
    "tokens_per_block": BuildFlag(INT),
}

OWNED: Mapping[str, str] = {
    "checkpoint_dir": "--checkpoint",
    "output_dir": "--output",
    "max_batch_size": "build.max_batch_size",
    "max_input_len": "build.max_input_len",
    "max_seq_len": "build.max_seq_len",
    "max_num_tokens": "tensorrt_llm.max_num_tokens",
    "opt_num_tokens": "tensorrt_llm.opt_batch_size",
    "gemm_plugin": "tensorrt_llm.gemm_plugin",
    "workers": "tensorrt_llm.workers",
    "max_draft_len": "convert.num_beams and convert.draft_len",
    "input_timing_cache": "tensorrt_llm.cache_dir",
    "output_timing_cache": "tensorrt_llm.cache_dir",
}
"""Flags that follow from other settings, and which; giving them a second time would let the two disagree."""
