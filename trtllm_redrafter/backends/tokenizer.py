"""The engine's tokenizer and chat template, through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import InputError, RequestError
from trtllm_redrafter.fsio import read_json

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

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

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

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]], *, chat: bool) -> tuple[int, ...]:
        """Token ids of a text, or of a conversation rendered by the chat template up to the assistant's turn."""
        if not chat:
            if not isinstance(prompt, str):
                raise RequestError("messages need the chat template", remedy="pass --chat, or a plain prompt")
            return tuple(self.encode(prompt))
        if not self.has_chat_template:
            raise RequestError(
                "the tokenizer has no chat template", remedy="pass --no-chat to continue the prompt as plain text"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        try:
            rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of its own: whatever it raises is about these messages
            raise RequestError(
                "the chat template refused the messages",
                why=str(error),
                remedy="give the roles in the order the model was trained on, or pass --no-chat",
            ) from error
        return tuple(self.encode(rendered, add_special_tokens=False))


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
