"""The text side of engines: which tokenizer a build puts into one, whether it is the model's, and what ends a text.

build_text(None, checkpoint).end_token_ids                  # of an engine to be built: (2,)
tokenizer, ends = engine_text(engine, vocab_size=config.vocab_size, recorded=())        # of one that is loaded
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_redrafter.base_models.tokenizer import has_tokenizer, load_tokenizer, tokenizer_files, tokenizer_sha256
from trtllm_redrafter.base_models.tokenizer_setup import tokenizer_setup
from trtllm_redrafter.checkpoint.names import TOKENIZER_DIRECTORY
from trtllm_redrafter.errors import InputError, RequestError, raise_together
from trtllm_redrafter.prompts.chat_template import ChatTemplate, encode_prompt
from trtllm_redrafter.prompts.messages import Prompt

if TYPE_CHECKING:
    from trtllm_redrafter.checkpoint.reader import Checkpoint  # imports torch, which planning does without

REMEDY = "build the engine again with --tokenizer DIR"


class EngineTokenizer:
    """What runners and the CLI need of a transformers tokenizer."""

    def __init__(self, folder: Path, loaded: Any = None) -> None:
        """`loaded`: the tokenizer in `folder`, where it has been read already; else `InputError` if it cannot be."""
        self._tokenizer: Any = load_tokenizer(folder, remedy=REMEDY) if loaded is None else loaded
        self._template = ChatTemplate.of(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """Texts of the tokens that `skip_special_tokens` leaves out, by id."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {int(i): str(token.content) for i, token in added.items() if token.special}

    @property
    def eos_token_id(self) -> int | None:
        token_id = self._tokenizer.eos_token_id
        return None if token_id is None else int(token_id)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `RequestError` for what the library cannot tokenize, such as half a surrogate pair."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except Exception as error:  # the libraries raise errors of several kinds
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise RequestError("the text cannot be tokenized", why=why, remedy="pass text of valid Unicode") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Exact text; a fast tokenizer is asked directly, since this runs for every step of every request."""
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        if fast is not None:
            text: str = fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
            return text
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a text, or of a conversation rendered by the chat template up to the assistant's turn."""
        return encode_prompt(self, self._template, prompt)


def engine_text(engine: Path, *, vocab_size: int, recorded: object) -> tuple[EngineTokenizer | None, frozenset[int]]:
    """An engine's tokenizer, None if it was built without one, and the tokens that end a text.

    `recorded` is what the engine's own config keeps of them.
    """
    folder = engine / TOKENIZER_DIRECTORY
    text = tokenizer_setup(folder, vocab_size=vocab_size, remedy=REMEDY, recorded=recorded)
    tokenizer = None if text.tokenizer is None else EngineTokenizer(folder, text.tokenizer)
    return tokenizer, frozenset(text.end_token_ids)


_ENDS_SHOWN = 8


@dataclass(frozen=True)
class BuildText:
    """`source` is copied into the engine; None: there is nothing. `notes` are for people."""

    source: Path | None
    takes_text: bool
    end_token_ids: tuple[int, ...]
    notes: tuple[str, ...]

    def render(self) -> str:
        text = str(self.source) if self.takes_text else "no tokenizer: the engine will take token ids only"
        ends = ", ".join(map(str, self.end_token_ids[:_ENDS_SHOWN])) or "none known"
        return f"{text}; end tokens {ends}"


def tokenizer_source(given: Path | None, checkpoint: Path) -> Path | None:
    """`--tokenizer`, or what `convert` put into the checkpoint; nothing is loaded."""
    if given is None:
        inside = checkpoint / TOKENIZER_DIRECTORY
        return inside if tokenizer_files(inside) else None
    if not has_tokenizer(given):
        remedy = "pass the directory that holds tokenizer.json"
        raise InputError("there is no tokenizer here", where=given, remedy=remedy)
    return given


def build_text(given: Path | None, checkpoint: Checkpoint) -> BuildText:
    """Load and check the tokenizer (`given` by --tokenizer); `InputError` when it is damaged or not for this model."""
    source, manifest = tokenizer_source(given, checkpoint.path), checkpoint.manifest
    if manifest is not None and given is None:
        problems = manifest.check_tokenizer(checkpoint.path)
        raise_together(InputError, problems, "the checkpoint's tokenizer is damaged", where=checkpoint.path)
    remedy = f"pass {'another one' if given is None else 'the tokenizer of this model'} with --tokenizer"
    recorded = () if manifest is None else manifest.end_tokens
    text = tokenizer_setup(source, vocab_size=checkpoint.config.vocab_size, remedy=remedy, recorded=recorded)
    notes = list(text.notes)
    known = None if manifest is None else manifest.tokenizer_sha256
    if given is not None and known is not None and known != tokenizer_sha256(given):
        notes.append(f"{given} is not the tokenizer the base model came with: check that the two agree")
    return BuildText(source, text.tokenizer is not None, text.end_token_ids, tuple(notes))
