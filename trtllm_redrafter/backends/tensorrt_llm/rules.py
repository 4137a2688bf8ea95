"""What cannot work, or does not work as it seems to, found before an hour is spent on building.

Each rule looks at the checkpoint's config, the options and the release, and yields problems; all of them are reported
together. Sources: TensorRT-LLM's builder and kernels as documented in docs/tensorrt-llm.md.

    findings = check(config, options, settings, target)
    findings.refusals, findings.warnings
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.tensorrt_llm.attention import TOKENS_PER_BLOCK, tree_kernel
from trtllm_redrafter.backends.tensorrt_llm.flag_plan import MODE, allowed_fusions
from trtllm_redrafter.backends.tensorrt_llm.flag_table import FLAGS, OWNED
from trtllm_redrafter.backends.tensorrt_llm.options import FlagSetting, TensorRTLLMOptions
from trtllm_redrafter.backends.tensorrt_llm.versions import (
    MIN_COMPUTE_CAPABILITY,
    NVIDIA_EXAMPLE_BASES,
    TARGET,
    Status,
    release_for,
    same_line,
)
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.layout import divisibility_problems
from trtllm_redrafter.checkpoint.quantization import DRAFTER_EXCLUDE, is_excluded
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.planning.gpus import Gpu

USUAL_HEAD_SIZES = (64, 128)
USUAL_GROUPS = (1, 2, 4, 8, 16, 32)
LARGE_BATCH = 64
FP8_FLAGS = ("gemm_swiglu_plugin", "low_latency_gemm_plugin", "low_latency_gemm_swiglu_plugin")
_NEED_FUSED_MLP = ("gemm_swiglu_plugin", "low_latency_gemm_swiglu_plugin")
NUM_TOKENS_WARNING = 16384
FP4_COMPUTE_CAPABILITY = (10, 0)


@dataclass(frozen=True)
class Findings:
    """All problems of a plan."""

    refusals: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def check(config: CheckpointConfig, options: BuildOptions, settings: TensorRTLLMOptions, target: Gpu) -> Findings:
    """Everything that is known to fail or to behave unexpectedly."""
    where = str(options.checkpoint)
    refusals = [
        *_release_refusals(config, settings),
        *_model_refusals(config, where),
        *_limit_refusals(config, options, settings, where),
        *_flag_refusals(config, settings),
        *_gpu_refusals(config, target, where),
        *_kernel_refusals(config, settings, target, where),
    ]
    warnings = [
        *_release_warnings(config, settings),
        *_model_warnings(config, where),
        *_option_warnings(config, options, settings),
    ]
    return Findings(tuple(refusals), tuple(warnings))


def _release_refusals(config: CheckpointConfig, settings: TensorRTLLMOptions) -> Iterator[Problem]:
    release = release_for(settings.version)
    where, remedy = f"TensorRT-LLM {settings.version}", f"use TensorRT-LLM {TARGET}"
    if release is None:
        yield Problem(f"{settings.version!r} is not a version", "tensorrt_llm.version", None, remedy)
    elif release.status is Status.REFUSED:
        yield Problem("this release is not supported", where, release.notes[0], remedy)
    elif config.drafter is not None and config.family not in release.families:
        yield Problem(f"this release drafts for {', '.join(release.families)} bases only", where, None, remedy)
    elif config.drafter is not None and config.quant_algo == "FP8" and not release.fp8_base:
        yield Problem("this release drafts for 16-bit bases only", where, None, remedy)


def _release_warnings(config: CheckpointConfig, settings: TensorRTLLMOptions) -> Iterator[Problem]:
    release = release_for(settings.version)
    if release is not None and release.status is Status.ACCEPTED and not same_line(settings.version, TARGET):
        yield Problem(
            f"TensorRT-LLM {settings.version} is not the release this was written for",
            why="; ".join(release.notes),
            remedy=f"use {TARGET}, or run `verify ENGINE --reference CHECKPOINT` on what it builds",
        )
    if config.drafter is not None and config.base_architecture not in NVIDIA_EXAMPLE_BASES:
        yield Problem(
            f"NVIDIA has no ReDrafter example with a {config.base_architecture} base",
            why=f"{config.architecture} serves it by the same class; no run of it is known",
            remedy="check the engine with `verify ENGINE --reference CHECKPOINT`",
        )


def _model_refusals(config: CheckpointConfig, where: str) -> Iterator[Problem]:
    if config.pp_size != 1:
        why = "the drafter sits on every rank and reads embedding and LM head, which stages do not share"
        yield Problem("pipeline parallelism does not work with a drafter", where, why, "use tensor parallelism only")
    if config.dtype == "float32":
        why = "the attention kernels for draft tokens exist for float16 and bfloat16"
        yield Problem("the checkpoint is float32", where, why, "convert with --dtype bfloat16")
    yield from divisibility_problems(config, where)
    if config.draft_shape is not None:
        for problem in config.draft_shape.problems():
            yield Problem(problem.what, where, problem.why, problem.remedy)
    if config.num_attention_heads % config.num_key_value_heads:
        what = f"{config.num_attention_heads} heads are no multiple of {config.num_key_value_heads} KV heads"
        yield Problem(what, where, "the attention kernels group them", None)
    excludes = config.quantization.get("exclude_modules")
    if config.drafter is not None and config.quant_algo is not None and not is_excluded("drafter.input_proj", excludes):
        why = "the builder would treat its 16-bit weights as quantized ones"
        remedy = f"add {DRAFTER_EXCLUDE!r} to quantization.exclude_modules, or convert again"
        yield Problem("the drafter is not excluded from quantization", where, why, remedy)


def _model_warnings(config: CheckpointConfig, where: str) -> Iterator[Problem]:
    if config.drafter is not None and config.head_size not in USUAL_HEAD_SIZES:
        why = "TensorRT-LLM compiles the kernel that verifies draft tokens for it; no run of one is known"
        yield Problem(f"heads have {config.head_size} values", where, why, "check it with `verify --reference`")
    if config.drafter is not None and (group := _group(config)) not in USUAL_GROUPS:
        why = (
            "comments in TensorRT-LLM's kernels disagree whether groups that are no power of two may verify draft "
            "tokens; NVIDIA ran ReDrafter with groups of 5 (Qwen2.5 14B, FP8)"
        )
        yield Problem(f"{group} query heads share a KV head", where, why, "check it with `verify --reference`")
    if config.drafter is not None and config.use_parallel_embedding and config.tp_size > 1:
        why = "the drafter looks tokens up at every drafted position; NVIDIA's test does not split the embedding"
        yield Problem("the embedding is split over the ranks", where, why, "leave convert.parallel_embedding off")
    if config.kv_cache_quant_algo == "FP8" and config.family == "qwen":
        why = "an FP8 KV cache made a Qwen-14B engine wrong (TensorRT-LLM issue 2607)"
        yield Problem("the KV cache of a Qwen model is FP8", where, why, "check the engine with `verify --reference`")
    if config.drafter is None:
        yield Problem("the checkpoint has no drafter", where, "the engine will decode autoregressively", None)


def _limit_refusals(
    config: CheckpointConfig, options: BuildOptions, settings: TensorRTLLMOptions, where: str
) -> Iterator[Problem]:
    for name in ("max_batch_size", "max_input_len", "max_seq_len"):
        value = getattr(options, name)
        if value < 1:
            yield Problem(f"{name} is {value}", f"build.{name}", None, "use a positive number")
    if options.max_seq_len > config.max_position_embeddings:
        what = f"max_seq_len {options.max_seq_len} exceeds the model's {config.max_position_embeddings} positions"
        yield Problem(what, where, None, f"pass --max-seq-len {config.max_position_embeddings} or less")
    if options.max_input_len >= options.max_seq_len:
        what = f"max_input_len {options.max_input_len} leaves no room to write within max_seq_len {options.max_seq_len}"
        yield Problem(what, "build", None, "pass a smaller --max-input-len or a larger --max-seq-len")
    if settings.max_num_tokens is not None and settings.max_num_tokens < options.max_input_len:
        what = f"max_num_tokens {settings.max_num_tokens} is less than a prompt of {options.max_input_len} tokens"
        why = "prompts are not cut into pieces, so the engine would refuse long ones at run time"
        yield Problem(what, "tensorrt_llm.max_num_tokens", why, "raise it, or lower build.max_input_len")
    if not config.greedy and config.drafter is not None and not settings.allow_sampling:
        why = (
            "TensorRT-LLM accepts drafts by rand < p_base / p_draft per beam and keeps the longest beam, which does "
            "not preserve the base model's distribution, and at temperatures other than 1 it appears to scale rows "
            "by other requests' temperatures"
        )
        remedy = "convert with --greedy, or set tensorrt_llm.allow_sampling: true and check the texts"
        yield Problem("the checkpoint asks for a sampling engine", where, why, remedy)


def _option_warnings(
    config: CheckpointConfig, options: BuildOptions, settings: TensorRTLLMOptions
) -> Iterator[Problem]:
    if config.drafter is not None and options.max_batch_size > LARGE_BATCH:
        why = "drafting buffers grow with it, and drafting pays at small batches"
        yield Problem(f"max_batch_size is {options.max_batch_size}", "build", why, "look at the latency plan")
    if not config.greedy and config.drafter is not None and settings.allow_sampling:
        why = "its acceptance rule is not exact; temperatures other than 1 are suspect"
        yield Problem("the engine will sample", "tensorrt_llm.allow_sampling", why, "greedy engines are exact")
    if (settings.max_num_tokens or 0) > NUM_TOKENS_WARNING:
        why = "activations grow with it, and the builder warns above this"
        yield Problem(f"max_num_tokens is above {NUM_TOKENS_WARNING}", "tensorrt_llm.max_num_tokens", why, None)
    for name, stays in allowed_fusions(config, settings.flags).items():
        if settings.flags.get(name) == "enable" and not stays:
            why = f"the builder switches it off for {config.architecture}, with a line in its log"
            yield Problem(f"{name} will have no effect", "tensorrt_llm.flags", why, "leave it out")
    for name in FP8_FLAGS:
        if settings.flags.get(name) == "fp8" and config.drafter is not None:
            yield Problem(f"{name} with ReDrafter has not been verified", "tensorrt_llm.flags", None, "compare both")
    if settings.runtime.block_reuse:
        why = "ReDrafter rewinds the cache after every step; nobody has verified it together with shared blocks"
        yield Problem("KV blocks will be shared between prompts", "tensorrt_llm.block_reuse", why, "leave it off")


def _flag_refusals(config: CheckpointConfig, settings: TensorRTLLMOptions) -> Iterator[Problem]:
    where = "tensorrt_llm.flags"
    gemm = settings.gemm_plugin
    if gemm == "fp8" and config.quant_algo != "FP8":
        why = f"the weights are {config.quant_algo or config.dtype}"
        yield Problem("gemm_plugin is fp8", "tensorrt_llm.gemm_plugin", why, "leave it out, or use an FP8 base")
    elif gemm in ("float16", "bfloat16") and gemm != config.dtype:
        why = f"the checkpoint is {config.dtype}, and the network is typed strictly"
        yield Problem(f"gemm_plugin is {gemm}", "tensorrt_llm.gemm_plugin", why, "leave it out")
    for name, value in settings.flags.items():
        if name in OWNED:
            yield Problem(f"{name} follows from another setting", where, None, f"set {OWNED[name]}")
        elif name not in FLAGS:
            near = difflib.get_close_matches(name, list(FLAGS), 1)
            remedy = f"did you mean {near[0]!r}?" if near else "remove it"
            yield Problem(f"trtllm-build has no flag {name!r} that can be set here", where, None, remedy)
        elif not FLAGS[name].legal(value):
            yield Problem(f"{name} is {value!r}", where, None, f"it takes {FLAGS[name].legal_values}")
        else:
            yield from _combination_refusals(name, value, config, settings)


_FIXED: dict[str, tuple[FlagSetting, str]] = {
    "kv_cache_type": ("paged", "the engine's executor needs a paged KV cache"),
    "remove_input_padding": ("enable", "in-flight batching packs its requests"),
    "multiple_profiles": ("disable", "its several token ranges do not fit the one profile of ReDrafter's tensors"),
    "streamingllm": ("disable", "the builder refuses it"),
    "strip_plan": (False, "an engine without weights must be refitted before it runs, which nothing here does"),
}
_FIXED_WITH_DRAFTER: dict[str, tuple[FlagSetting, str]] = {
    name: (False, f"{which}ReDrafter's graph takes one row of logits per prompt, and trtllm-build does not notice")
    for name, which in (("gather_context_logits", ""), ("gather_all_token_logits", "it includes context logits: "))
}


def _combination_refusals(
    name: str, value: FlagSetting, config: CheckpointConfig, settings: TensorRTLLMOptions
) -> Iterator[Problem]:
    where = "tensorrt_llm.flags"
    if name == "max_beam_width" and value != 1:
        why = "TensorRT fails with a shape error: draft tokens are beams already"
        yield Problem(f"max_beam_width is {value}", where, why, "leave it out; set convert.num_beams")
    fixed = _FIXED if config.drafter is None else _FIXED | _FIXED_WITH_DRAFTER
    if name in fixed and value != fixed[name][0]:
        yield Problem(f"{name} is {value!r}", where, fixed[name][1], "leave it out")
    if name == "speculative_decoding_mode" and value != MODE:
        yield Problem(f"speculative_decoding_mode is {value}", where, f"ReDrafter is {MODE}", "leave it out")
    if name == "gpt_attention_plugin" and value not in ("auto", config.dtype):
        why = f"the checkpoint is {config.dtype}, and drafting needs the plugin"
        yield Problem(f"gpt_attention_plugin is {value}", where, why, "leave it out")
    if name in FP8_FLAGS and value == "fp8" and config.quant_algo != "FP8":
        yield Problem(f"{name} is fp8", where, f"the weights are {config.quant_algo or config.dtype}", "leave it out")
    if name in _NEED_FUSED_MLP and value == "fp8" and settings.flags.get("use_fused_mlp") == "disable":
        yield Problem(f"{name} without use_fused_mlp", where, "the builder refuses it", "leave use_fused_mlp out")
    both = settings.flags.get("low_latency_gemm_swiglu_plugin") == settings.flags.get("gemm_swiglu_plugin") == "fp8"
    if name == "gemm_swiglu_plugin" and both:
        what = "gemm_swiglu_plugin and low_latency_gemm_swiglu_plugin replace the same layer"
        yield Problem(what, where, "one is for large batches, the other for small ones", "choose one")


def _gpu_refusals(config: CheckpointConfig, target: Gpu, where: str) -> Iterator[Problem]:
    if target.compute_capability < MIN_COMPUTE_CAPABILITY:
        yield Problem(f"{target.title} is older than compute capability 8.0", "tensorrt_llm.gpu", None, None)
    algo, cache = config.quant_algo or "", config.kv_cache_quant_algo or ""
    if (algo.startswith("FP8") or algo == "W4A8_AWQ") and target.fp8_flops is None:
        what, why = f"{algo} weights cannot run on {target.title}", "it has no FP8 arithmetic"
        yield Problem(what, "tensorrt_llm.gpu", why, "use a Hopper or Ada GPU")
    if "NVFP4" in (algo, cache) and target.compute_capability < FP4_COMPUTE_CAPABILITY:
        what = f"{'weights' if algo == 'NVFP4' else 'a KV cache'} in NVFP4 cannot run on {target.title}"
        yield Problem(what, "tensorrt_llm.gpu", "FP4 arithmetic begins with Blackwell", "quantize to FP8 instead")


def _group(config: CheckpointConfig) -> int:
    """Query heads per KV head on one rank; with fewer KV heads than ranks, each rank has one and fewer query heads."""
    return config.num_attention_heads // config.tp_size // max(config.num_key_value_heads // config.tp_size, 1)


def _kernel_refusals(
    config: CheckpointConfig, settings: TensorRTLLMOptions, target: Gpu, where: str
) -> Iterator[Problem]:
    """TensorRT-LLM says so at the first request only: No available XQA kernels are found."""
    group, block = _group(config), settings.flags.get("tokens_per_block", TOKENS_PER_BLOCK)
    if config.drafter is None or group < 1 or not isinstance(block, int):
        return  # any kernel will do, or refused for another reason
    kind, reasons = tree_kernel(
        group=group,
        head_size=config.head_size,
        tokens_per_block=block,
        fp8_cache=config.kv_cache_quant_algo == "FP8",
        capability=target.compute_capability,
    )
    if reasons:
        why = f"groups of {group} get the kernel {kind}; " + "; ".join(reasons)
        yield Problem("no attention kernel verifies draft tokens of this model", where, why, _KERNEL_REMEDY)


_KERNEL_REMEDY = (
    "use more or fewer ranks, a KV block of 32 tokens (tensorrt_llm.flags.tokens_per_block) or another cache type; "
    "without a drafter, other kernels serve the model"
)
