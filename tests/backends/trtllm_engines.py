"""Engines of the stand-in builder, and what the stand-in model writes: shared by the tests of both interfaces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.engines import write_checkpoint, write_tokenizer
from tests.trtllm_options import options, settings
from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import Request, Result, Runner, SamplingParams
from trtllm_redrafter.progress import no_progress

VOCAB = 259


def write_checkpoints(folder: Path) -> Path:
    """`one` and `two` ranks with a 3 x 4 drafter, and `plain` without; a tokenizer beside them."""
    write_tokenizer(folder / "tokenizer")
    for name, changes in (("one", {}), ("plain", {"drafter": False}), ("two", {"tp_size": 2, "vocab_size": 260})):
        sizes: dict[str, Any] = {"vocab_size": VOCAB, "head_dim": 32, **changes}  # 32: the smallest that has kernels
        write_checkpoint(folder / name, dtype="bfloat16", num_beams=3, draft_len=4, **sizes)
    return folder


def build(checkpoints: Path, folder: Path, name: str = "one", *, tokenizer: bool = True, **changes: Any) -> Path:
    request = options(
        replace(settings(cache_dir=folder / "cache"), **changes), checkpoint=checkpoints / name / "checkpoint",
        output=folder / "engine", tokenizer=checkpoints / "tokenizer" if tokenizer else None,
        max_batch_size=4, max_input_len=100, max_seq_len=200,
    )  # fmt: skip
    backend = load_backend("tensorrt-llm")
    return backend.build(backend.plan(request), no_progress)


def expected(prompt: tuple[int, ...], count: int, vocab: int = VOCAB, end: int = 2) -> list[int]:
    """The stand-in's rule, up to the end token."""
    found: list[int] = []
    while len(found) < count and (not found or found[-1] != end):
        found.append((5 * (found or prompt)[-1] + 7) % vocab)
    return found


def run(runner: Runner, *prompts: tuple[int, ...], **sampling: Any) -> list[Result]:
    params = SamplingParams(**{"max_tokens": 20, **sampling})
    return runner.generate([Request(prompt, params) for prompt in prompts])
