"""What a build with TensorRT-LLM will do, worked out without TensorRT-LLM, a GPU or torch.

plan = plan_build(options)        # MismatchError with every reason why it cannot work
print(plan.render())              # flags, changes, warnings, memory
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.engine_config import TENSORRT
from trtllm_redrafter.backends.tensorrt_llm.flag_plan import FlagPlan, plan_flags
from trtllm_redrafter.backends.tensorrt_llm.options import TensorRTLLMOptions
from trtllm_redrafter.backends.tensorrt_llm.rules import check
from trtllm_redrafter.backends.tokenizer import tokenizer_source
from trtllm_redrafter.base_models.tokenizer import has_model_config, has_tokenizer
from trtllm_redrafter.checkpoint.config import CheckpointConfig, read_checkpoint_config
from trtllm_redrafter.errors import InputError, MismatchError, Problem, UsageError, raise_together
from trtllm_redrafter.fsio import check_replaceable
from trtllm_redrafter.planning.gpus import Gpu, gpu
from trtllm_redrafter.planning.memory import MemoryEstimate, estimate_memory


@dataclass(frozen=True)
class TensorRTLLMBuildPlan:
    """Flags, memory and warnings of one build."""

    options: BuildOptions
    settings: TensorRTLLMOptions
    config: CheckpointConfig
    target: Gpu
    flags: FlagPlan
    memory: MemoryEstimate
    warnings: tuple[Problem, ...]
    tokenizer: Path | None

    def render(self) -> str:
        config, shape = self.config, self.config.draft_shape
        drafts = "none: autoregressive" if shape is None else f"{shape.num_beams} beams x {shape.draft_len} tokens"
        mode = "" if shape is None else (", greedy" if config.greedy else ", sampling")
        has_text = self.tokenizer is not None and has_tokenizer(self.tokenizer)
        quant = f", {config.quant_algo} weights" if config.quant_algo else ""
        kv = f", {config.kv_cache_quant_algo} KV cache" if config.kv_cache_quant_algo else ""
        lines = [
            f"build   {self.options.checkpoint} -> {self.options.output}",
            f"with    TensorRT-LLM {self.settings.version} for {config.tp_size} x {self.target.title}",
            f"model   {config.architecture}: {config.parameters_hint}, {config.dtype}{quant}{kv}",
            f"drafts  {drafts}{mode}",
            f"text    {self.tokenizer if has_text else 'no tokenizer: the engine will take token ids only'}",
            "",
            self.flags.render(),
            "",
            self.memory.render(),
        ]
        if self.warnings:
            lines += ["", "warnings"]
            lines += ["  - " + problem.render().replace("\n", "\n    ") for problem in self.warnings]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        shape = self.config.draft_shape
        return {
            "backend": TENSORRT,
            "checkpoint": str(self.options.checkpoint),
            "output": str(self.options.output),
            "tensorrt_llm": self.settings.version,
            "gpu": self.target.name,
            "architecture": self.config.architecture,
            "dtype": self.config.dtype,
            "tp_size": self.config.tp_size,
            "quant_algo": self.config.quant_algo,
            "kv_cache_quant_algo": self.config.kv_cache_quant_algo,
            "draft": None if shape is None else {"num_beams": shape.num_beams, "draft_len": shape.draft_len},
            "tokenizer": None if self.tokenizer is None else str(self.tokenizer),
            **self.flags.as_dict(),
            "memory": self.memory.as_dict(),
            "warnings": [problem.as_dict() for problem in self.warnings],
            "runtime": self.settings.runtime.as_dict(),
        }


def plan_build(options: BuildOptions) -> TensorRTLLMBuildPlan:
    """Read the checkpoint's config and check everything that can be known from it."""
    config = read_checkpoint_config(options.checkpoint)
    missing = _missing_ranks(options.checkpoint, config.tp_size)
    raise_together(InputError, missing, "the checkpoint is incomplete", where=options.checkpoint)
    plan = plan_for(config, options)
    check_replaceable(options.output, overwrite=options.overwrite)
    tokenizer = tokenizer_source(options.tokenizer, options.checkpoint)
    return replace(plan, tokenizer=tokenizer, warnings=(*plan.warnings, *_serving_warnings(tokenizer)))


def plan_for(config: CheckpointConfig, options: BuildOptions) -> TensorRTLLMBuildPlan:
    """The plan of a checkpoint that need not exist yet; `MismatchError` lists every refusal."""
    settings = settings_of(options)
    target = gpu(settings.gpu)
    findings = check(config, options, settings, target)
    refusals = list(findings.refusals)
    if refusals:  # sizes that make no sense are not planned further
        raise_together(MismatchError, refusals, "the engine cannot be built", where=options.checkpoint)
    flags = plan_flags(config, options, settings)
    memory = estimate_memory(config, flags.limits, target, kv_cache_fraction=settings.runtime.kv_cache_fraction)
    raise_together(MismatchError, memory.problems(), "the engine cannot run", where=options.checkpoint)
    warnings = (*findings.warnings, *memory.warnings())
    return TensorRTLLMBuildPlan(options, settings, config, target, flags, memory, warnings, None)


def _serving_warnings(tokenizer: Path | None) -> list[Problem]:
    if tokenizer is None or has_model_config(tokenizer):
        return []
    what = "the tokenizer's directory lacks the base model's config.json"
    why = "`trtllm-serve` reads it at start-up and fails; `run` does not need it"
    return [Problem(what, str(tokenizer), why, "pass the base model's own directory as --tokenizer")]


def settings_of(options: BuildOptions) -> TensorRTLLMOptions:
    if options.tensorrt_llm is None:
        raise UsageError(
            "the tensorrt-llm backend needs its settings", remedy="make the build options with recipe.options"
        )
    return options.tensorrt_llm


def _missing_ranks(checkpoint: Path, ranks: int) -> list[Problem]:
    names = [f"rank{rank}.safetensors" for rank in range(ranks)]
    remedy = f"the config names {ranks} rank(s); convert again, or copy the file"
    return [Problem(f"{name} is missing", str(checkpoint), None, remedy) for name in names
            if not (checkpoint / name).is_file()]  # fmt: skip
