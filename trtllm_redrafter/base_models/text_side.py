"""A model's tokenizer, checked, and its end tokens, by the same rules for every command.

text = text_side(Path("base"), vocab_size=49152, remedy="download the tokenizer again")
text.tokenizer, text.end_token_ids, text.notes       # None, (2,), () for a model without a tokenizer
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.base_models.end_tokens import end_tokens
from trtllm_redrafter.base_models.tokenizer import has_tokenizer
from trtllm_redrafter.base_models.tokenizer_loading import library_errors
from trtllm_redrafter.base_models.vocabulary import tokenizer_for, unusable_note


@dataclass(frozen=True)
class TextSide:
    """`tokenizer` is a transformers tokenizer, or None if there is none; `notes` are for people."""

    tokenizer: Any
    end_token_ids: tuple[int, ...]
    notes: tuple[str, ...]


def text_side(folder: Path | None, *, vocab_size: int, remedy: str, recorded: object = ()) -> TextSide:
    """For a base model's directory, or the tokenizer directory of a checkpoint or engine (None: it has none).

    `recorded` are end tokens from an earlier step. `InputError` if the tokenizer cannot be loaded or is not for
    a model of `vocab_size` tokens.
    """
    tokenizer = None
    if folder is not None and has_tokenizer(folder):
        tokenizer = tokenizer_for(folder, vocab_size=vocab_size, remedy=remedy)
    with library_errors("the tokenizer cannot be read", where=folder or "the engine", remedy=remedy):
        ends = end_tokens(folder, tokenizer, vocab_size=vocab_size, recorded=recorded)
        unusable = None if tokenizer is None else unusable_note(tokenizer, vocab_size)
    return TextSide(tokenizer, ends.ids, ends.notes if unusable is None else (*ends.notes, unusable))
