"""Training text: JSON lines in, token ids with the spans to learn from out.

Three kinds of lines, one kind per file:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    {"text": "Once upon a time ..."}
    {"prompt": "Why is the sky blue?", "category": "science"}        the base model writes the answer

Of a chat only the assistant's tokens are learnt, end token included; of plain text everything but the first token.
What is wrong with a file is reported line by line, all of it together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from trtllm_redrafter.base_models.vocabulary import beyond_message, first_beyond
from trtllm_redrafter.errors import InputError, Problem, raise_together

T = TypeVar("T")

SHOWN = 20
"""Problems of one file that a message lists."""


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that training uses."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


@dataclass(frozen=True)
class TokenizedText:
    """Token ids, and the half-open spans of them that are learnt. A span never begins at 0."""

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return sum(end - start for start, end in self.spans)

    @classmethod
    def answer(cls, prompt: Sequence[int], answer: Sequence[int]) -> TokenizedText:
        return cls((*prompt, *answer), ((len(prompt), len(prompt) + len(answer)),))


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer, tokenized through the chat template, and the line it came from."""

    token_ids: tuple[int, ...]
    category: str
    line: int


def read_texts(path: Path, tokenizer: ChatTokenizer, *, max_tokens: int, eos: Sequence[int]) -> list[TokenizedText]:
    """Chats or plain texts; what is longer than `max_tokens` is cut there."""
    return _read(path, lambda record: _text(record, tokenizer, max_tokens, frozenset(eos)))


def read_prompts(path: Path, tokenizer: ChatTokenizer, *, max_tokens: int) -> list[Prompt]:
    """Prompts; one that leaves no room for an answer within `max_tokens` is an error of its line."""

    def prompt(record: Mapping[str, Any]) -> list[tuple[int, ...]]:
        content = record.get("prompt")
        if not isinstance(content, str) or not content:
            raise ValueError("`prompt` is missing or not a text")
        ids = tuple(chat_token_ids(tokenizer, [{"role": "user", "content": content}], answer_next=True))
        if len(ids) >= max_tokens:
            raise ValueError(f"the prompt has {len(ids)} tokens, more than {max_tokens - 1}")
        return [ids]

    numbered = _read_numbered(path, prompt)
    return [Prompt(ids, str(record.get("category", "")), line) for line, record, [ids] in numbered]


def check_range(texts: Sequence[TokenizedText | Prompt], path: Path, tokenizer: Any, vocab_size: int) -> None:
    """`InputError` naming every text with a token that has no row in the base model's embedding."""
    problems = []
    for number, text in enumerate(texts, start=1):
        found = first_beyond(text.token_ids, vocab_size=vocab_size)
        if found is not None:
            where = f"line {text.line}" if isinstance(text, Prompt) else f"text {number}"
            problems.append(Problem(beyond_message(found, vocab_size=vocab_size, tokenizer=tokenizer), where))
    more = [Problem(f"{len(problems) - SHOWN} more texts")] if len(problems) > SHOWN else []
    remedy = "leave these tokens out, or remove the lines"
    raise_together(InputError, [*problems[:SHOWN], *more], "some texts cannot be used", where=path, remedy=remedy)


def _read(path: Path, parse: Callable[[Mapping[str, Any]], list[TokenizedText]]) -> list[TokenizedText]:
    return [text for _, _, texts in _read_numbered(path, parse) for text in texts]


def _read_numbered(
    path: Path, parse: Callable[[Mapping[str, Any]], list[T]]
) -> list[tuple[int, Mapping[str, Any], list[T]]]:
    """(line number, record, what `parse` made of it); `InputError` with every bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot be read", where=path, why=str(error), remedy="pass a UTF-8 JSON-lines file") from error
    found: list[tuple[int, Mapping[str, Any], list[T]]] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("the line is not a JSON object")
            found.append((number, record, parse(record)))
        except ValueError as error:
            problems.append(Problem(str(error), f"line {number}"))
    more = [Problem(f"{len(problems) - SHOWN} more lines")] if len(problems) > SHOWN else []
    raise_together(
        InputError, [*problems[:SHOWN], *more], "some lines cannot be used", where=path, remedy="correct or remove them"
    )
    if not found:
        raise InputError("the file has no lines", where=path, remedy="give at least one text or prompt")
    return found


def _text(
    record: Mapping[str, Any], tokenizer: ChatTokenizer, max_tokens: int, eos: frozenset[int]
) -> list[TokenizedText]:
    if "messages" in record:
        text = _chat(record["messages"], tokenizer, eos)
    elif isinstance(record.get("text"), str):
        ids = tuple(tokenizer.encode(record["text"]))
        text = TokenizedText(ids, ((1, len(ids)),) if len(ids) > 1 else ())
    elif "prompt" in record:
        raise ValueError("the line is a prompt without an answer; pass the file as prompts")
    else:
        raise ValueError("the line has neither `messages` nor `text`")
    cut = TokenizedText(
        text.token_ids[:max_tokens], tuple((a, min(b, max_tokens)) for a, b in text.spans if a < max_tokens)
    )
    return [cut] if cut.rows else []


def _chat(messages: Any, tokenizer: ChatTokenizer, eos: frozenset[int]) -> TokenizedText:
    """Each assistant turn's tokens are what the template adds to everything before it."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ValueError("`messages` is not a list of objects with `role` and `content`")
    ids: tuple[int, ...] = ()
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tuple(chat_token_ids(tokenizer, messages[:i], answer_next=True))
        after = tuple(chat_token_ids(tokenizer, messages[: i + 1], answer_next=False))
        if after[: len(before)] != before or before[: len(ids)] != ids:
            raise ValueError(
                f"the chat template rewrites earlier turns at message {i + 1}, so its tokens are not known"
            )
        # Templates add a line break after the end token; the model never writes it.
        ends = [k + 1 for k in range(len(before), len(after)) if after[k] in eos]
        spans.append((len(before), ends[0] if ends else len(after)))
        ids = after
    if not spans:
        raise ValueError("no message has the role `assistant`: nothing to learn")
    return TokenizedText(ids, tuple(spans))


def chat_token_ids(tokenizer: ChatTokenizer, messages: list[dict[str, Any]], *, answer_next: bool) -> list[int]:
    """A conversation through the chat template; `ValueError` when it refuses. (transformers 5 returns a mapping.)"""
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=answer_next)
    except Exception as error:  # templates raise errors of their own kinds for chats they refuse
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)
