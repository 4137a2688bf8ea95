"""The engine's tokenizer and chat template, through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.prompts.chat_template import ChatTemplate, encode_prompt
from trtllm_redrafter.prompts.messages import Prompt, normalise

TOKENIZER_DIRECTORY = "tokenizer"


class EngineTokenizer:
    """What runners and the CLI need of a transformers tokenizer."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: Any = _load(folder)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                "the tokenizer cannot be loaded",
                where=folder,
                why=(str(error) or type(error).__name__)[:200],
                remedy="build the engine again with --tokenizer DIR",
            ) from error
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
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

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

    def encode_prompt(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        chat: bool,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a text, or of a conversation rendered by the chat template up to the assistant's turn."""
        content = prompt if isinstance(prompt, str) else normalise(prompt)
        return encode_prompt(self, self._template, Prompt(content, template_kwargs=template_kwargs or {}), chat=chat)


def _load(folder: Path) -> Any:
    """A tokenizer.json alone is enough; settings and chat template beside it are used when they are there."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = folder / "tokenizer_config.json"
    name = read_json(settings).get("tokenizer_class") if settings.exists() else None
    # TokenizersBackend is what transformers 5 calls the fast tokenizer without a class of its own; 4 does not know it
    kind = PreTrainedTokenizerFast if name in (None, "TokenizersBackend") else AutoTokenizer
    return kind.from_pretrained(str(folder), local_files_only=True)


def eos_token_ids(folder: Path, tokenizer: EngineTokenizer | None) -> frozenset[int]:
    """Tokens that end a text: generation_config.json's, and the tokenizer's own."""
    found: set[int] = set()
    generation = folder / "generation_config.json"
    if generation.exists():
        value = read_json(generation).get("eos_token_id")
        found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(found)
