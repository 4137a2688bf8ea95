"""The engine's tokenizer and chat template, through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from trtllm_redrafter.base_models.tokenizer import load_tokenizer
from trtllm_redrafter.base_models.tokenizer_setup import tokenizer_setup
from trtllm_redrafter.checkpoint.names import TOKENIZER_DIRECTORY
from trtllm_redrafter.errors import RequestError
from trtllm_redrafter.prompts.chat_template import ChatTemplate, encode_prompt
from trtllm_redrafter.prompts.messages import Prompt

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
