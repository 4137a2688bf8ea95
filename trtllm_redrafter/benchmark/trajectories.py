"""Acceptance lengths of a whole grid, from texts that the base model writes once.

The texts come from the recipe's engine if that is of the torch backend, whose hidden states are those it drafts from;
otherwise from transformers.

    texts = engine_texts(runner, items, max_tokens=128)
    grid_acceptance(base, drafter, texts, shapes, ...)        # one Acceptance per shape
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.backends.base import Request, SamplingParams
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.benchmark.prompts import BenchPrompt, Item
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.prompts.chat_template import ChatTemplate, encode_any
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.training.acceptance import Acceptance, borrowed_head, evaluate_grid
from trtllm_redrafter.training.drafter_reader import read_drafter
from trtllm_redrafter.training.evaluation import draft_vocab
from trtllm_redrafter.training.fit import BaseTensors
from trtllm_redrafter.training.frozen_base import FrozenBase, load_tokenizer
from trtllm_redrafter.training.rows import TrainingRows
from trtllm_redrafter.training.self_distill import TransformersWriter, WritingOptions

ROWS_AT_ONCE = 256
"""Positions to draft from at once; bounds the size of the [rows, beams, vocabulary] array."""


@dataclass(frozen=True)
class Texts:
    """Texts of the base model: rows to draft from, and the sizes of an average request."""

    rows: TrainingRows
    categories: tuple[str, ...]
    mean_tokens: float
    prompt_seconds: float | None
    """Mean time of a prompt's pass; None if no engine was timed."""
    written_by: str


def engine_texts(runner: TorchRunner, items: Sequence[Item], *, max_tokens: int, progress: Progress) -> Texts:
    """Texts of an engine, which must be idle, with hidden states and prompt times."""
    parts: list[tuple[Tensor, Tensor]] = []
    prompt_seconds = tokens = 0.0
    runner.generate([Request(items[0].token_ids, SamplingParams(2))])  # the first prompt may compile kernels
    for number, item in enumerate(items, start=1):
        [result] = runner.generate([Request(item.token_ids, SamplingParams(max_tokens))])
        prompt_seconds += result.prefill_seconds
        tokens += len(result.token_ids)
        start, ids = len(item.token_ids), (*item.token_ids, *result.token_ids)
        with torch.no_grad():
            states = runner.executor.hidden_states(0, ids)
        parts.append((states[start - 1 : -1].cpu(), torch.tensor(result.token_ids)))
        progress("record texts", number, len(items), "texts")
    count = len(items)
    return Texts(
        TrainingRows.join(parts), tuple(i.category for i in items), tokens / count, prompt_seconds / count, "the engine"
    )


def transformers_texts(
    base: FrozenBase,
    prompts: Sequence[BenchPrompt],
    *,
    max_tokens: int,
    batch: int,
    progress: Progress,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Texts:
    """The same without an engine. Of several turns, only the first is answered."""
    tokenizer = load_tokenizer(base.path)
    template = ChatTemplate.of(tokenizer)
    asked = [replace(p.prompt, template_kwargs={**template_kwargs, **p.prompt.template_kwargs}) for p in prompts]
    ids = [encode_any(tokenizer, template, prompt) for prompt in asked]
    writer, parts, tokens = TransformersWriter(base), [], 0
    options = WritingOptions(max_tokens, 0.0, 0, batch)
    for first in range(0, len(ids), batch):
        some = ids[first : first + batch]
        for prompt, answer in zip(some, writer.write(some, options, first), strict=True):
            [states] = base.hidden([(*prompt, *answer)])
            parts.append((states[len(prompt) - 1 : -1].cpu(), torch.tensor(answer)))
            tokens += len(answer)
        progress("record texts", min(first + batch, len(ids)), len(ids), "texts")
    categories = tuple(p.category for p in prompts)
    return Texts(TrainingRows.join(parts), categories, tokens / len(ids), None, "transformers")


def grid_acceptance(
    base: FrozenBase,
    drafter: Path,
    texts: Texts,
    grid: Sequence[DraftShape],
    *,
    head_rows: int,
    progress: Progress,
) -> list[Acceptance]:
    """Acceptance of each shape on the same texts. `head_rows`: size of the engine's reduced draft head; 0: whole."""
    model = read_drafter(drafter, max(shape.draft_len for shape in grid)).to(base.head.device, base.head.dtype)
    vocab = draft_vocab(drafter)
    rows = None if vocab is None or not head_rows else vocab[:head_rows]
    tensors = BaseTensors(base.embedding, base.head, torch.arange(base.head.shape[0]))
    head = borrowed_head(model, base.head, rows)
    return evaluate_grid(
        model, tensors, texts.rows, grid, head=head, batch=ROWS_AT_ONCE, categories=texts.categories, progress=progress
    )
