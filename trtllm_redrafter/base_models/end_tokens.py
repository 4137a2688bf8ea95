"""The tokens that end a text: one set for all commands and both backends.

Models name them in up to three places, which often differ: generation_config.json, config.json and the tokenizer. The
set is the union, as users of vLLM and transformers' chat pipelines expect. `convert` and `build` record it, so that an
engine keeps what its base model's config.json says.

    ends = end_tokens(Path("base"), tokenizer, vocab_size=49152)
    ends.ids, ends.notes          # (2, 0), ("... is outside the vocabulary",)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import read_json

_FILES = ("generation_config.json", "config.json")
_KEY = "eos_token_id"


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
