"""What a conversion is asked for. Every field is resolved; the recipe holds the defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.config import DTYPES, CheckpointConfig
from trtllm_redrafter.errors import Problem, RedrafterError, UsageError
from trtllm_redrafter.fsio import overlaps

AUTO_DTYPE = "auto"
AUTO_HEAD, EMBEDDING_HEAD, FILE_HEAD = LM_HEADS = ("auto", "embedding", "file")


@dataclass(frozen=True)
class ConvertOptions:
    """`base` is a Hugging Face model or a TensorRT-LLM checkpoint; without `drafter`, a plain checkpoint results.

    `dtype` is "auto" (the base's own) or a name. `num_beams` and `draft_len` None: what the drafter was trained for.
    `lm_head` is "auto" (the base's config.json decides), "embedding" or "file": see `conversion.base`.
    `parallel_embedding` splits the embedding's rows over ranks; a checkpoint as base keeps its own setting.
    """

    base: Path
    drafter: Path | None
    output: Path
    dtype: str
    tp_size: int
    num_beams: int | None
    draft_len: int | None
    greedy: bool
    parallel_embedding: bool
    workers: int
    overwrite: bool
    lm_head: str = AUTO_HEAD

    def applied_to(self, config: CheckpointConfig) -> CheckpointConfig:
        """A base model's config with the dtype, ranks and embedding layout that are asked for."""
        dtype = self.dtype if self.dtype in DTYPES else config.dtype
        return replace(
            config, dtype=dtype, tp_size=self.tp_size, use_parallel_embedding=self.parallel_embedding
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def option_problems(options: ConvertOptions) -> tuple[type[RedrafterError], list[Problem]]:
    """Options that are not valid, whatever the input files are."""
    found = []
    if options.tp_size < 1:
        found.append(Problem(f"tp_size is {options.tp_size}", "--tp-size", None, "use 1 or more"))
    if options.workers < 1:
        found.append(Problem(f"workers is {options.workers}", "--workers", None, "use 1 or more"))
    if options.dtype not in (AUTO_DTYPE, *DTYPES):
        remedy = f"use {AUTO_DTYPE}, {', '.join(DTYPES)}"
        found.append(Problem(f"dtype is {options.dtype!r}", "--dtype", None, remedy))
    if options.lm_head not in LM_HEADS:
        found.append(Problem(f"lm_head is {options.lm_head!r}", "--lm-head", None, f"use {', '.join(LM_HEADS)}"))
    if options.drafter is None:
        for flag, value in (("--num-beams", options.num_beams), ("--draft-len", options.draft_len)):
            if value is not None:
                why = "without a drafter nothing is drafted"
                found.append(Problem(f"{flag} {value} has no meaning here", flag, why, "pass --drafter, or drop it"))
    for role, path in (("base", options.base), ("drafter", options.drafter)):
        if path is not None and overlaps(options.output, path):
            what = f"the output overlaps the {role} directory"
            why = "replacing the output would delete the input, or mix with it"
            found.append(Problem(what, str(options.output), why, "choose another --output"))
    return UsageError, found
