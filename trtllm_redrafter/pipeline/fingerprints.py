"""What each stage's output follows from: its input files and the keys that shape it."""

from __future__ import annotations

from pathlib import Path

from trtllm_redrafter import __version__
from trtllm_redrafter.checkpoint.manifest import MANIFEST
from trtllm_redrafter.pipeline.cache import Fingerprint, HashCache, manifest_hashes
from trtllm_redrafter.recipe.layers import Resolved, plain

CONVERT, BUILD, RUN = "convert", "build", "run"

_SHAPING = {
    CONVERT: ("dtype", "tp_size", "num_beams", "draft_len", "greedy", "parallel_embedding"),
    BUILD: ("max_batch_size", "max_input_len", "max_seq_len"),
    RUN: ("prompts", "chat", "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "stop_token_ids",
          "skip_special_tokens", "num_beams", "draft_len", "draft"),
}  # fmt: skip
"""The keys of a section that decide what its stage writes; paths, devices and `workers` do not."""

_TENSORRT = ("version", "gpu", "gemm_plugin", "max_num_tokens", "opt_batch_size", "flags", "kv_cache_fraction",
             "block_reuse", "multi_block_mode")  # fmt: skip


def output_of(stage: str, resolved: Resolved) -> Path | None:
    recipe = resolved.recipe
    outputs: dict[str, Path | None] = {CONVERT: recipe.checkpoint, BUILD: recipe.engine, RUN: recipe.run.output}
    return outputs[stage]


def fingerprint(stage: str, resolved: Resolved, hashes: HashCache) -> Fingerprint:
    """Reads (or remembers) the content of everything the stage will read; its inputs must exist."""
    recipe = resolved.recipe
    options = {f"{stage}.{key}": plain(resolved.value(f"{stage}.{key}")) for key in _SHAPING[stage]}
    inputs: dict[str, str] = {}
    if stage == CONVERT:
        assert recipe.base is not None
        inputs |= hashes.directory(recipe.base, "base")
        if recipe.drafter is not None:
            inputs |= hashes.directory(recipe.drafter, "drafter")
    elif stage == BUILD:
        assert recipe.checkpoint is not None
        options["backend"] = recipe.backend
        if recipe.backend == "tensorrt-llm":
            options |= {f"tensorrt_llm.{key}": plain(resolved.value(f"tensorrt_llm.{key}")) for key in _TENSORRT}
        inputs |= manifest_hashes(recipe.checkpoint, "checkpoint")
        if recipe.build.tokenizer is not None:
            inputs |= hashes.directory(recipe.build.tokenizer, "tokenizer")
    else:
        assert recipe.engine is not None
        options["chat_template_kwargs"] = dict(recipe.chat_template_kwargs)
        inputs |= {k: v for k, v in manifest_hashes(recipe.engine, "engine").items() if not k.endswith(MANIFEST)}
        if recipe.run.input is not None:
            inputs["input"] = hashes.sha256(recipe.run.input)
    return Fingerprint({"version": __version__, **options}, inputs)
