"""Which tokens of a chat the assistant wrote: where the template says so, else by comparing turn by turn.

A template with `{% generation %}` marks answers itself. For others, an answer is what the template adds to the
conversation before it. Some templates write an answer differently once another turn follows (Qwen3 drops the
reasoning of earlier answers); then the conversation becomes several texts, each ending with an answer as the model
wrote it, since that is what the model sees when it answers:

    turn 1    <user>Hi<assistant><think></think>Hello<end>
    turn 2    <user>Hi<assistant>Hello<end><user>And?<assistant><think></think>More<end>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.prompts.chat_template import ChatTemplate, encode_text
from trtllm_redrafter.prompts.messages import Message

Spans = list[tuple[int, int]]
AnsweredText = tuple[tuple[int, ...], Spans]
"""Token ids, and the half-open spans of them that are answers, end tokens included."""


def answered_texts(
    tokenizer: Any,
    template: ChatTemplate,
    messages: Sequence[Message],
    kwargs: Mapping[str, Any],
    eos: frozenset[int],
) -> list[AnsweredText]:
    """A chat's texts and their answers. `InputError` or `RequestError` when the template does not let them be found."""
    if all(message["role"] != "assistant" for message in messages):
        raise InputError("no message has the role `assistant`: nothing to learn")
    if template.marks_answers and getattr(tokenizer, "is_fast", False):
        return [_marked(tokenizer, template, messages, kwargs, eos)]
    return _compared(tokenizer, template, messages, kwargs, eos)


def _marked(
    tokenizer: Any, template: ChatTemplate, messages: Sequence[Message], kwargs: Mapping[str, Any], eos: frozenset[int]
) -> AnsweredText:
    """By the template's own marks, in characters; a token counts that has any of them."""
    rendered = template.render(messages, kwargs, answer_next=False, marked=True)
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = tuple(encoded["input_ids"]), []
    for start, end in rendered.spans or ():
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start and b > a]
        if inside:
            after = inside[-1] + 1
            stop = after + 1 if after < len(ids) and ids[after] in eos else after  # a mark may end before the end token
            spans.append((max(1, inside[0]), _end(ids, inside[0], stop, eos)))
    if not spans:
        raise InputError(
            "the chat template marks no answer in this conversation", remedy="check its `generation` marks"
        )
    return ids, spans


def _compared(
    tokenizer: Any, template: ChatTemplate, messages: Sequence[Message], kwargs: Mapping[str, Any], eos: frozenset[int]
) -> list[AnsweredText]:
    """An answer is what the template adds to everything before it."""

    def encode(count: int, *, answer_next: bool) -> tuple[int, ...]:
        text = template.render(messages[:count], kwargs, answer_next=answer_next).text
        return encode_text(tokenizer, text, add_special_tokens=False)

    texts: list[AnsweredText] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = encode(i, answer_next=True), encode(i + 1, answer_next=False)
        start = _common(asked, answered)
        if start < len(asked) and start < _common(encode(i, answer_next=False), asked):
            raise InputError(
                f"the chat template rewrites earlier turns at message {i + 1}, so its tokens are not known",
                remedy="mark answers in the template with {% generation %}, or give the chat as `text`",
            )
        span = (max(1, start), _end(answered, start, len(answered), eos))
        if texts and _goes_on(texts[-1], answered):
            texts[-1] = answered, [*texts[-1][1], span]
        else:
            texts.append((answered, [span]))
    return texts


def _goes_on(before: AnsweredText, ids: tuple[int, ...]) -> bool:
    """Does the longer conversation have all answers of the shorter one as they were written?"""
    end = before[1][-1][1]
    return ids[:end] == before[0][:end]


def _end(ids: tuple[int, ...], start: int, stop: int, eos: frozenset[int]) -> int:
    """Templates add a line break after the end token; the model never writes it."""
    return next((k + 1 for k in range(start, stop) if ids[k] in eos), stop)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
