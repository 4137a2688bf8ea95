"""Every flag that will be passed to `trtllm-build`, and every value the builder will change on its own.

For ReDrafter the builder overrides values without asking: it sets max_draft_len, adds it to max_seq_len, raises
max_num_tokens, forces the decoding mode, and switches fusions off. All of it is computed here and shown in advance.

    plan = plan_flags(config, options, settings)
    plan.value("opt_num_tokens")                     # 208
    plan.changes[0].render()                         # max_seq_len 2048 -> 2073: positions for the tree
    plan.arguments(checkpoint=..., output=..., timing_cache_in=None, timing_cache_out=...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.tensorrt_llm.attention import FP8_CONTEXT_ALGOS, TOKENS_PER_BLOCK, context_attention
from trtllm_redrafter.backends.tensorrt_llm.flag_table import FLAGS, OWNED, SWITCH
from trtllm_redrafter.backends.tensorrt_llm.options import FlagSetting, TensorRTLLMOptions
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.planning.memory import BuildLimits

MODE = "explicit_draft_tokens"
"""What TensorRT-LLM calls ReDrafter's kind of speculation."""

MODE_INT = 16
"""The same in an engine's config.json."""

FUSED_MLP_ALGOS = (None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")
REDUCE_FUSION_CLASSES = ("LlamaForCausalLM", "Gemma2ForCausalLM", "MedusaForCausalLM")


@dataclass(frozen=True)
class PassedFlag:
    """One flag of the command line, where its value came from and why it is passed."""

    name: str
    value: FlagSetting
    origin: str
    reason: str

    @property
    def arguments(self) -> list[str]:
        if FLAGS[self.name].kind == SWITCH:
            return [f"--{self.name}"] if self.value else []
        return [f"--{self.name}", str(self.value)]


@dataclass(frozen=True)
class Override:
    """A value the builder ends up with, other than the one it was given."""

    name: str
    given: str
    becomes: str
    why: str

    def render(self) -> str:
        return f"{self.name} {self.given} -> {self.becomes}: {self.why}"


@dataclass(frozen=True)
class FlagPlan:
    """The whole command line but for paths, and what the builder makes of it."""

    flags: tuple[PassedFlag, ...]
    changes: tuple[Override, ...]
    limits: BuildLimits
    expected: Mapping[str, Any]
    """`build_config` values the finished engine must show."""

    def value(self, name: str) -> FlagSetting | None:
        return next((flag.value for flag in self.flags if flag.name == name), None)

    def arguments(
        self, *, checkpoint: Path, output: Path, timing_cache_in: Path | None, timing_cache_out: Path
    ) -> list[str]:
        """Arguments after the program's name."""
        paths = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(output)]
        paths += ["--input_timing_cache", str(timing_cache_in)] if timing_cache_in is not None else []
        paths += ["--output_timing_cache", str(timing_cache_out)]
        return paths + [argument for flag in self.flags for argument in flag.arguments]

    def render(self) -> str:
        names = max(len(flag.name) for flag in self.flags) + 2
        values = max(len(str(flag.value)) for flag in self.flags)
        lines = ["trtllm-build"]
        lines += [f"  {'--' + f.name:<{names}}  {f.value!s:<{values}}  {f.reason}  [{f.origin}]" for f in self.flags]
        lines.append("the builder changes" if self.changes else "the builder changes nothing of this")
        return "\n".join(lines + [f"  {change.render()}" for change in self.changes])

    def as_dict(self) -> dict[str, Any]:
        return {
            "flags": [dict(vars(flag)) for flag in self.flags],
            "changes": [dict(vars(change)) for change in self.changes],
            "limits": dict(vars(self.limits)),
        }


def plan_flags(config: CheckpointConfig, options: BuildOptions, settings: TensorRTLLMOptions) -> FlagPlan:
    """Derive every flag; what is wrong with them is found by `rules`."""
    tree = 1 if config.draft_shape is None else config.draft_shape.max_tree_tokens
    flags = [*_limit_flags(options, settings, tree), *_graph_flags(config), *_kernel_flags(config, settings)]
    known = {flag.name: flag for flag in flags}
    given = {name: value for name, value in settings.flags.items() if name not in OWNED}
    for name, value in given.items():
        known[name] = PassedFlag(name, value, settings.origin("flags"), _replaced(known.get(name)))
    passed = tuple(flag for flag in known.values() if flag.name in FLAGS and FLAGS[flag.name].legal(flag.value))
    values = {flag.name: flag.value for flag in passed}
    expected = _expected(config, options, values)
    limits = BuildLimits(options.max_batch_size, options.max_input_len, options.max_seq_len, expected["max_num_tokens"])
    return FlagPlan(passed, tuple(_changes(config, values, expected)), limits, expected)


def _replaced(flag: PassedFlag | None) -> str:
    return "asked for" if flag is None else f"asked for instead of {flag.value}"


def _limit_flags(options: BuildOptions, settings: TensorRTLLMOptions, tree: int) -> list[PassedFlag]:
    batch, longest = options.max_batch_size, options.max_input_len
    tokens, tokens_origin = settings.max_num_tokens, settings.origin("max_num_tokens")
    if tokens is None:
        tokens = min(longest + (batch - 1) * tree, batch * options.max_seq_len)
        tokens = max(tokens, batch * tree, TOKENS_PER_BLOCK)
        tokens_origin = "derived from max_input_len, max_batch_size and the tree"
    tuned = min(settings.opt_batch_size or batch, batch)
    origin = settings.origin("opt_batch_size") if settings.opt_batch_size else "derived from max_batch_size"
    reason = f"tuned for {tuned} request(s) x {tree} verified rows; the builder's own guess forgets the tree"
    return [
        PassedFlag("max_batch_size", batch, settings.origin("max_batch_size"),
                   "drafting buffers and max_num_tokens grow with it; the builder's default is 2048"),
        PassedFlag("max_input_len", longest, settings.origin("max_input_len"), "longest prompt"),
        PassedFlag("max_seq_len", options.max_seq_len, settings.origin("max_seq_len"), "longest prompt and answer"),
        PassedFlag("max_num_tokens", tokens, tokens_origin, "a whole prompt beside the other requests' trees"),
        PassedFlag("opt_num_tokens", min(tuned * tree, tokens), origin, reason),
    ]  # fmt: skip


def _graph_flags(config: CheckpointConfig) -> list[PassedFlag]:
    """What the model class needs; another value cannot work."""
    needed = "needed by ReDrafter" if config.drafter is not None else "needed by in-flight batching"
    flags = [
        PassedFlag("max_beam_width", 1, "fixed", "TensorRT fails on any other width with draft tokens"),
        PassedFlag("kv_cache_type", "paged", "fixed", needed),
        PassedFlag("remove_input_padding", "enable", "fixed", needed),
        PassedFlag("context_fmha", "enable", "fixed", "as NVIDIA's ReDrafter test builds"),
        PassedFlag("multiple_profiles", "disable", "fixed", "several token ranges do not fit ReDrafter's one profile"),
    ]
    if config.drafter is not None:
        flags.append(PassedFlag("speculative_decoding_mode", MODE, "fixed", "ReDrafter"))
    return flags


def _kernel_flags(config: CheckpointConfig, settings: TensorRTLLMOptions) -> list[PassedFlag]:
    fp8_model = config.quant_algo == "FP8"
    gemm = settings.gemm_plugin or ("fp8" if fp8_model else config.dtype)
    gemm_origin = settings.origin("gemm_plugin") if settings.gemm_plugin else "derived from the checkpoint"
    gemm_reason = "NVIDIA's ReDrafter example for FP8 uses it; its tuning guide switches it off for FP8: try both"
    paged, fp8_context = context_attention(config.quant_algo, config.kv_cache_quant_algo, paged=True, fp8=True)
    fused = "enable" if _no_fused_mlp(config) is None else "disable"
    checkpoint = "derived from the checkpoint"
    flags = [
        PassedFlag("gpt_attention_plugin", config.dtype, checkpoint, "attention kernels that verify draft tokens"),
        PassedFlag("gemm_plugin", gemm, gemm_origin, gemm_reason if fp8_model else "as NVIDIA's ReDrafter test builds"),
        PassedFlag("use_paged_context_fmha", _switch(paged), checkpoint, "prompts read the cache by pages"
                   if paged else f"not with an {config.kv_cache_quant_algo} KV cache under these weights"),
        PassedFlag("use_fp8_context_fmha", _switch(fp8_context), checkpoint, "prompts are attended to in FP8"
                   if fp8_context else f"needs an FP8 KV cache and weights in {', '.join(FP8_CONTEXT_ALGOS)}"),
        PassedFlag("use_fused_mlp", fused, checkpoint, "gate and up projection as one product"
                   if fused == "enable" else _no_fused_mlp(config) or ""),
        PassedFlag("reduce_fusion", "disable", "fixed", "NVIDIA advises it for LLaMA; off for ReDrafter's classes"),
    ]  # fmt: skip
    if config.tp_size > 1:
        flags.append(PassedFlag("nccl_plugin", "auto", "fixed", "several ranks"))
    flags.append(PassedFlag("workers", settings.workers, settings.origin("workers"), "ranks built at the same time"))
    return flags


def _switch(on: bool) -> str:
    return "enable" if on else "disable"


def _changes(
    config: CheckpointConfig, passed: Mapping[str, FlagSetting], expected: Mapping[str, Any]
) -> list[Override]:
    """Every value that the builder will not leave as it was passed."""
    found = []
    if config.draft_shape is not None:
        shape, longest = config.draft_shape, str(passed["max_seq_len"])
        why = f"{shape.num_beams} beams x {shape.draft_len} from config.json"
        found += [
            Override("max_draft_len", "0", str(expected["max_draft_len"]), why),
            Override(
                "max_seq_len", longest, str(expected["max_seq_len"]), "cache positions for the tree being verified"
            ),
        ]
    tokens, effective = int(passed["max_num_tokens"]), expected["max_num_tokens"]
    if effective != tokens:
        why = "every request's tree in one step" if effective > tokens else "no more than every request at full length"
        found.append(Override("max_num_tokens", str(tokens), str(effective), why))
    if expected["opt_num_tokens"] != passed["opt_num_tokens"]:
        why = "no more than max_num_tokens before it is raised"
        found.append(Override("opt_num_tokens", str(passed["opt_num_tokens"]), str(expected["opt_num_tokens"]), why))
    if config.tp_size > 1:
        found.append(Override("nccl_plugin", "auto", config.dtype, "several ranks"))
    why = f"not for {config.architecture} on {config.tp_size} rank(s) with {config.quant_algo or config.dtype} weights"
    fusions = allowed_fusions(config, passed)
    found += [
        Override(name, "enable", "disable", why)
        for name in fusions
        if passed.get(name) == "enable" and not fusions[name]
    ]
    if passed["use_fused_mlp"] == "enable" and (reason := _no_fused_mlp(config)) is not None:
        found.append(Override("use_fused_mlp", "enable", "no effect", reason))
    reason = f"{config.kv_cache_quant_algo or config.dtype} KV cache, {config.quant_algo or config.dtype} weights"
    found += [
        Override(name, str(passed[name]), _switch(becomes), reason)
        for name, becomes in expected["plugin_config"].items()
        if name in ("use_paged_context_fmha", "use_fp8_context_fmha") and passed[name] != _switch(becomes)
    ]
    return found


def allowed_fusions(config: CheckpointConfig, passed: Mapping[str, FlagSetting]) -> dict[str, bool]:
    """Of the fusions that are asked for, those that the builder leaves on; it allows none for ReDrafter's classes."""
    asked = {name: passed.get(name) == "enable" for name in ("reduce_fusion", "user_buffer", "norm_quant_fusion")}
    reduce = asked["reduce_fusion"] and config.tp_size > 1 and config.architecture in REDUCE_FUSION_CLASSES
    llama_fp4 = config.architecture == "LlamaForCausalLM" and config.quant_algo == "NVFP4"
    return {
        "reduce_fusion": reduce,
        "user_buffer": asked["user_buffer"] and reduce,
        "norm_quant_fusion": asked["norm_quant_fusion"] and llama_fp4 and not reduce,
    }


def _no_fused_mlp(config: CheckpointConfig) -> str | None:
    return None if config.quant_algo in FUSED_MLP_ALGOS else f"the builder skips {config.quant_algo} layers"


def _expected(config: CheckpointConfig, options: BuildOptions, passed: Mapping[str, FlagSetting]) -> dict[str, Any]:
    """The builder's own arithmetic: what it caps, it caps before the draft tokens are added, and then raises.

    A step holds at most every request at full length, at least one KV block, and at least every request's tree.
    """
    shape = config.draft_shape
    drafted = 0 if shape is None else shape.max_draft_tokens
    block = int(passed.get("tokens_per_block", TOKENS_PER_BLOCK))
    capped = max(min(int(passed["max_num_tokens"]), options.max_batch_size * options.max_seq_len), block)
    fmha = passed["context_fmha"] == "enable"
    paged, fp8 = context_attention(
        config.quant_algo,
        config.kv_cache_quant_algo,
        paged=fmha and passed["use_paged_context_fmha"] == "enable",
        fp8=fmha and passed["use_fp8_context_fmha"] == "enable",
    )
    values = {
        "max_batch_size": options.max_batch_size,
        "max_input_len": options.max_input_len,
        "max_seq_len": options.max_seq_len + drafted,
        "max_num_tokens": capped if shape is None else max(capped, options.max_batch_size * (drafted + 1)),
        "opt_num_tokens": min(int(passed["opt_num_tokens"]), capped),
        "max_beam_width": 1,
        "plugin_config": {
            "use_paged_context_fmha": paged,
            "use_fp8_context_fmha": fp8,
            **allowed_fusions(config, passed),
        },
    }
    return values if shape is None else values | {"max_draft_len": drafted, "speculative_decoding_mode": MODE_INT}
