"""A model's tokenizer and end tokens, by the same rules for every command and both backends.

Models name their end tokens in up to three places, often differently in each: generation_config.json, config.json and
the tokenizer. As users of vLLM and transformers' chat pipelines expect, all of them count. `convert` and `build` record
them, so that an engine keeps those of its base's config.json.

    text = tokenizer_setup(Path("base"), vocab_size=49152, remedy="download the tokenizer again")
    text.tokenizer, text.end_token_ids, text.notes       # None, (2,), () for a model without a tokenizer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.base_models.tokenizer import has_tokenizer, library_errors, tokenizer_for, unusable_note
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import read_json

_FILES = ("generation_config.json", "config.json")
_KEY = "eos_token_id"


@dataclass(frozen=True)
class TokenizerSetup:
    """`tokenizer` is a transformers tokenizer, or None if there is none; `notes` are to be shown."""

    tokenizer: Any
    end_token_ids: tuple[int, ...]
    notes: tuple[str, ...]


def tokenizer_setup(folder: Path | None, *, vocab_size: int, remedy: str, recorded: object = ()) -> TokenizerSetup:
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
    return TokenizerSetup(tokenizer, ends.ids, ends.notes if unusable is None else (*ends.notes, unusable))


@dataclass(frozen=True)
class EndTokens:
    """`ids` in the order found, distinct and inside the vocabulary; `notes` name those outside."""

    ids: tuple[int, ...]
    notes: tuple[str, ...]


def end_tokens(folder: Path | None, tokenizer: Any, *, vocab_size: int, recorded: object = ()) -> EndTokens:
    """The end tokens of the model or tokenizer in `folder`, plus those that an earlier step recorded.

    `tokenizer` is a transformers tokenizer, or None. `InputError` for values that are no token ids.
    """
    ids: list[int] = []
    notes: list[str] = []
    for source, token in _stated(folder, tokenizer, recorded):
        if not 0 <= token < vocab_size:
            notes.append(f"the end token {token} of {source} is never written: the vocabulary has {vocab_size} tokens")
        elif token not in ids:
            ids.append(token)
    return EndTokens(tuple(ids), tuple(dict.fromkeys(notes)))


def _stated(folder: Path | None, tokenizer: Any, recorded: object) -> Iterator[tuple[str, int]]:
    for name in _FILES if folder is not None else ():
        assert folder is not None
        if (folder / name).is_file():
            yield from _ids(name, read_json(folder / name).get(_KEY), folder / name)
    if tokenizer is not None:
        yield from _ids("the tokenizer", tokenizer.eos_token_id, folder)
    yield from _ids("the manifest", recorded, folder)


def _ids(source: str, value: object, where: Path | None) -> Iterator[tuple[str, int]]:
    values: Iterable[object] = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    for token in values:
        if type(token) is not int:
            raise InputError(
                f"{_KEY} is {value!r}",
                where=where,
                why=f"{source} must name a token id, a list of them, or null",
                remedy="correct the file, or download it again",
            )
        yield source, token
