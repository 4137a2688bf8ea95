"""Training text: JSON lines in, token ids with the spans to learn from out.

Three kinds of lines, one kind per file (chats in any form that `prompts.messages` reads):

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    {"text": "Once upon a time ..."}
    {"prompt": "Why is the sky blue?", "category": "science"}        the base model writes the answer

Of a chat only the assistant's tokens are learnt, end token included; of plain text everything but the first token.
Everything that is wrong with a file is reported together, line by line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trtllm_redrafter.base_models.tokenizer import beyond_message, first_beyond
from trtllm_redrafter.errors import InputError, Problem
from trtllm_redrafter.prompts.chat_template import ChatTemplate, encode_prompt, encode_text
from trtllm_redrafter.prompts.files import parse_all
from trtllm_redrafter.prompts.jsonl import raise_problems, read_lines
from trtllm_redrafter.prompts.messages import check_asks, check_characters, conversation, parse_prompt
from trtllm_redrafter.prompts.messages import template_kwargs as own_template_kwargs
from trtllm_redrafter.training.answer_spans import answered_texts


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
class TokenizedPrompt:
    """A prompt to answer, tokenized as the model reads it, and the line it came from."""

    token_ids: tuple[int, ...]
    category: str
    line: int


def read_texts(
    path: Path,
    tokenizer: Any,
    *,
    max_tokens: int,
    eos: Sequence[int],
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> list[TokenizedText]:
    """Chats or plain texts, cut after `max_tokens`."""
    template, ends = ChatTemplate.of(tokenizer), frozenset(eos)

    def texts(number: int, values: Mapping[str, Any]) -> list[TokenizedText]:
        found = _texts(values, tokenizer, template, template_kwargs, ends)
        return [cut for text in found if (cut := _cut(text, max_tokens)).rows]

    return [text for some in parse_all(read_lines(path), path, texts) for text in some]


def read_prompts(
    path: Path,
    tokenizer: Any,
    *,
    max_tokens: int,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> list[TokenizedPrompt]:
    """Prompts; one that leaves no space for an answer within `max_tokens` is an error of its line.

    Of several turns the first is asked.
    """
    template = ChatTemplate.of(tokenizer)

    def prompt(number: int, values: Mapping[str, Any]) -> TokenizedPrompt:
        asked = check_asks(parse_prompt(values)).with_template_kwargs(template_kwargs)
        ids = encode_prompt(tokenizer, template, asked)
        if len(ids) >= max_tokens:
            raise InputError(f"the prompt has {len(ids)} tokens, more than {max_tokens - 1}")
        if not ids:
            raise InputError("the prompt has no tokens")
        return TokenizedPrompt(ids, str(values.get("category", "")), number)

    return parse_all(read_lines(path), path, prompt)


def check_range(texts: Sequence[TokenizedText | TokenizedPrompt], path: Path, tokenizer: Any, vocab_size: int) -> None:
    """`InputError` naming every text with a token that has no row in the base model's embedding."""
    problems = []
    for number, text in enumerate(texts, start=1):
        found = first_beyond(text.token_ids, vocab_size=vocab_size)
        if found is not None:
            where = f"line {text.line}" if isinstance(text, TokenizedPrompt) else f"text {number}"
            problems.append(Problem(beyond_message(found, vocab_size=vocab_size, tokenizer=tokenizer), where))
    remedy = "leave these tokens out, or remove the lines"
    raise_problems(problems, "some texts cannot be used", where=path, remedy=remedy)


def _texts(
    values: Mapping[str, Any],
    tokenizer: Any,
    template: ChatTemplate | None,
    template_kwargs: Mapping[str, Any],
    eos: frozenset[int],
) -> list[TokenizedText]:
    check_characters(values)
    if "messages" in values or "conversations" in values:
        messages = conversation(values)
        if template is None:
            remedy = 'give plain texts, {"text": "…"}'
            raise InputError("the tokenizer has no chat template for the messages", remedy=remedy)
        kwargs = {**template_kwargs, **own_template_kwargs(values)}
        found = answered_texts(tokenizer, template, messages, kwargs, eos)
        return [TokenizedText(ids, tuple(spans)) for ids, spans in found]
    if isinstance(values.get("text"), str):
        ids = encode_text(tokenizer, values["text"])
        return [TokenizedText(ids, ((1, len(ids)),) if len(ids) > 1 else ())]
    if "prompt" in values or "turns" in values:
        raise InputError("the line is a prompt without an answer", remedy="pass the file as prompts (--prompts)")
    raise InputError("the line has neither `messages`, `conversations` nor `text`", remedy='write {"text": "…"}')


def _cut(text: TokenizedText, max_tokens: int) -> TokenizedText:
    spans = tuple((a, min(b, max_tokens)) for a, b in text.spans if a < max_tokens)
    return TokenizedText(text.token_ids[:max_tokens], spans)
