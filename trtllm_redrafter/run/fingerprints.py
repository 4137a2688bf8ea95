"""What each stage's output follows from: its input files and the keys that shape it."""

from __future__ import annotations

from pathlib import Path

from trtllm_redrafter.checkpoint.names import MANIFEST
from trtllm_redrafter.conversion.drafter_config import DRAFT_LEN_IN_NAME
from trtllm_redrafter.run.stage_cache import Fingerprint, HashCache, manifest_hashes
from trtllm_redrafter.settings.layers import Resolved, plain
from trtllm_redrafter.settings.schema import SECTIONS
from trtllm_redrafter.version import __version__

CONVERT, BUILD, RUN = "convert", "build", "run"

_NOT_SHAPING = {
    CONVERT: ("workers",),
    BUILD: ("tokenizer",),
    RUN: ("input", "output", "device"),
    "tensorrt_llm": ("workers", "cache", "cache_dir", "allow_sampling"),
}
"""The keys of a section that do not decide what its stage writes. Paths do not either: the content behind them counts.

Named here are the exceptions, so that a key that is added to the schema is in the fingerprint from the start.
"""

_NEVER_READ = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".md", ".png")
"""Files of a base model's directory that no stage opens, whatever else is there; some are as large as the model."""


def _shaping(section: str) -> list[str]:
    return [key for key in SECTIONS[section].model_fields if key not in _NOT_SHAPING[section]]


def output_of(stage: str, resolved: Resolved) -> Path | None:
    recipe = resolved.recipe
    outputs: dict[str, Path | None] = {CONVERT: recipe.checkpoint, BUILD: recipe.engine, RUN: recipe.run.output}
    return outputs[stage]


def fingerprint(stage: str, resolved: Resolved, hashes: HashCache) -> Fingerprint:
    """Reads (or remembers) the content of everything the stage will read; its inputs must exist."""
    recipe = resolved.recipe
    options = {f"{stage}.{key}": plain(resolved.value(f"{stage}.{key}")) for key in _shaping(stage)}
    inputs: dict[str, str] = {}
    if stage == CONVERT:
        assert recipe.base is not None
        inputs |= hashes.directory(recipe.base, "base", unread=_NEVER_READ)
        if recipe.drafter is not None:
            names = (recipe.drafter.name, recipe.drafter.resolve().name)  # draft_len may come from there
            options["drafter_names"] = [m[0] for m in map(DRAFT_LEN_IN_NAME.search, names) if m is not None]
            inputs |= hashes.directory(recipe.drafter, "drafter")
    elif stage == BUILD:
        assert recipe.checkpoint is not None
        options["backend"] = recipe.backend
        if recipe.backend == "tensorrt-llm":
            keys = _shaping("tensorrt_llm")
            options |= {f"tensorrt_llm.{key}": plain(resolved.value(f"tensorrt_llm.{key}")) for key in keys}
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
