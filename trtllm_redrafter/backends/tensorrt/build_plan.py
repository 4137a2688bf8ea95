"""What a build for the tensorrt backend will do, and every reason why it cannot, before anything is written."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.engine_config import STEP_ENGINE_FORMAT, TENSORRT_STEPS
from trtllm_redrafter.backends.tensorrt.compilers import (
    AUTO,
    Compiler,
    check_host,
    choose_compiler,
    compile_bytes,
    import_compiler,
)
from trtllm_redrafter.backends.tensorrt.network import Sizes
from trtllm_redrafter.backends.tensorrt.networks import Network, engine_sizes, float8_weights, networks_of
from trtllm_redrafter.backends.tokenizer import BuildText, build_text
from trtllm_redrafter.backends.torch.build_plan import draft_head_rows, kv_cache_bytes, limit_and_model_problems
from trtllm_redrafter.checkpoint.names import EOS_TOKEN_IDS
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.structure import require_sound
from trtllm_redrafter.errors import MismatchError, raise_together
from trtllm_redrafter.fsio import check_replaceable
from trtllm_redrafter.paths import check_place
from trtllm_redrafter.planning.gpus import Gpu, gpu
from trtllm_redrafter.version import __version__

DEFAULT_GPU = "rtx-4090"

_PLAN_BYTES = 32 * 10**6
"""Disk space asked for: compressed plans take a fraction of it."""


@dataclass(frozen=True)
class TensorRTBuildPlan:
    """What is compiled, by what, for which card."""

    options: BuildOptions
    checkpoint: Checkpoint
    text: BuildText
    gpu: Gpu
    compiler: Compiler
    sizes: Sizes

    @property
    def weights_inside(self) -> bool:
        return self.options.tensorrt is not None and self.options.tensorrt.weights == "inside"

    @property
    def networks(self) -> list[Network]:
        return networks_of(self.sizes.draft)

    @property
    def kv_cache_bytes(self) -> int:
        return kv_cache_bytes(self.checkpoint.config, self.options.max_batch_size, self.sizes.capacity)

    def engine_config(self) -> dict[str, Any]:
        """config.json without what is known after the build."""
        options, place = self.options, self.options.checkpoint.resolve()
        return {
            "format": STEP_ENGINE_FORMAT,
            "backend": TENSORRT_STEPS,
            "version": __version__,
            "build_config": {
                "max_batch_size": options.max_batch_size,
                "max_input_len": options.max_input_len,
                "max_seq_len": options.max_seq_len,
            },
            "draft_head_rows": 0 if self.sizes.draft is None else draft_head_rows(self.checkpoint.config.vocab_size),
            EOS_TOKEN_IDS: list(self.text.end_token_ids),
            "gpu": self.gpu.name,
            "compute_capability": list(self.gpu.compute_capability),
            "checkpoint": {
                "path": str(place),
                "relative": os.path.relpath(place, options.output.resolve()),
            },
        }

    def as_dict(self) -> dict[str, Any]:
        config, shape = self.checkpoint.config, self.sizes.draft
        return {
            "backend": TENSORRT_STEPS,
            "checkpoint": str(self.options.checkpoint),
            "output": str(self.options.output),
            "architecture": config.architecture,
            "dtype": config.dtype,
            "tokenizer": None if self.text.source is None else str(self.text.source),
            "compiler": self.compiler.name,
            "gpu": self.gpu.name,
            "weights": "inside" if self.weights_inside else "inputs",
            "networks": [network.name for network in self.networks],
            "fused_attention": self.sizes.fused_attention,
            "kv_cache_positions": self.sizes.capacity,
            "kv_cache_bytes": self.kv_cache_bytes,
            "compile_bytes": compile_bytes(config.num_hidden_layers),
            EOS_TOKEN_IDS: list(self.text.end_token_ids),
            "notes": list(self.text.notes),
            **self.engine_config()["build_config"],
            "draft": None if shape is None else {**asdict(shape), "head_rows": self.sizes.draft_rows},
        }

    def render(self) -> str:
        values, shape = self.as_dict(), self.sizes.draft
        drafting = "none: autoregressive" if shape is None else f"{shape.num_beams} beams x {shape.draft_len} tokens"
        attention = "fused" if self.sizes.fused_attention else "products and a softmax: no kernel has this kind"
        where = "in every plan" if self.weights_inside else "stay in the checkpoint"
        lines = [
            f"build   {values['checkpoint']} -> {values['output']} for the tensorrt backend",
            f"model   {values['architecture']}, {values['dtype']}; weights {where}",
            f"drafts  {drafting}",
            f"limits  {values['max_batch_size']} requests, {values['max_input_len']} prompt tokens, "
            f"{values['max_seq_len']} in all; KV cache {self.kv_cache_bytes / 1e6:.0f} MB",
            f"gpu     {self.gpu.title}, compiled by {self.compiler.name}, attention: {attention}",
            f"builds  {', '.join(values['networks'])}: one process each, about {values['compile_bytes'] / 1e9:.1f} GB",
            f"text    {self.text.render()}",
            *(f"note    {note}" for note in self.text.notes),
        ]
        return "\n".join(lines)


def plan_build(options: BuildOptions) -> TensorRTBuildPlan:
    """Check everything a build could fail on; the compiler itself is looked for when the build starts."""
    checkpoint = Checkpoint.open(options.checkpoint)
    require_sound(checkpoint)
    config = checkpoint.config
    raise_together(MismatchError, limit_and_model_problems(checkpoint, options), "the engine cannot be built")
    check_replaceable(options.output, overwrite=options.overwrite)
    asked = options.tensorrt
    card = gpu(DEFAULT_GPU if asked is None else asked.gpu)
    compiler = choose_compiler(card, config.dtype, AUTO if asked is None else asked.compiler)
    if float8_weights(checkpoint):
        choose_compiler(card, "float8")
    text = build_text(options.tokenizer, checkpoint)
    inside = asked is not None and asked.weights == "inside"
    weights = sum(file.size for file in checkpoint.ranks) if inside else 0
    check_place(options.output, _PLAN_BYTES + len(networks_of(config.draft_shape)) * weights)
    rows = draft_head_rows(config.vocab_size)
    sizes = engine_sizes(checkpoint, config.draft_shape, max_seq_len=options.max_seq_len, head_rows=rows)
    return TensorRTBuildPlan(options, checkpoint, text, card, compiler, sizes)


def check_compiler(plan: TensorRTBuildPlan) -> str:
    """The compiler's version; `BackendError` where it or the GPU it needs is missing."""
    check_host(plan.compiler, plan.gpu)
    return str(import_compiler(plan.compiler).__version__)


def checkpoint_files(folder: Path, ranks: int) -> list[str]:
    """Names of the files that decide what an engine computes."""
    from trtllm_redrafter.checkpoint.names import DRAFT_VOCAB_FILE, rank_file_name

    names = ["config.json", *map(rank_file_name, range(ranks)), DRAFT_VOCAB_FILE]
    return [name for name in names if (folder / name).exists()]
