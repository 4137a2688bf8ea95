"""What a conversion is asked for. Every field is resolved; the recipe holds the defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

AUTO_DTYPE = "auto"
AUTO_HEAD, EMBEDDING_HEAD, FILE_HEAD = LM_HEADS = ("auto", "embedding", "file")


@dataclass(frozen=True)
class ConvertOptions:
    """`base` is a Hugging Face model or a TensorRT-LLM checkpoint; without `drafter`, a plain checkpoint results.

    `dtype` is "auto" (the base's own) or a name. `num_beams` and `draft_len` None: what the drafter was trained for.
    `lm_head` is "auto" (the base's config.json decides), "embedding" or "file": see `conversion.head`.
    `parallel_embedding` divides the embedding's rows over ranks; a checkpoint as base keeps its own setting.
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

    def as_dict(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
