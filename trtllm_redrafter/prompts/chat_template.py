"""A model's chat template: conversations in, text out, and which parts of it the assistant wrote.

    template = ChatTemplate.of(tokenizer)                  # None: a base model, whose prompts are plain text
    ids = encode_prompt(tokenizer, template, parse_prompt({"prompt": "Hi"}))

Templates are rendered here and not by `apply_chat_template`, so that a template that never ends, or whose output grows
without end, results in an error message (`bounded_jinja`, `time_limit`). A test compares the texts with transformers'.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trtllm_redrafter.errors import RequestError
from trtllm_redrafter.prompts.bounded_jinja import MARKS, TooLarge, environment
from trtllm_redrafter.prompts.messages import Message, Prompt
from trtllm_redrafter.prompts.time_limit import TimeExpired, time_limit

MAX_SECONDS = 5.0
"""Time limit per conversation; real templates take milliseconds."""

MAX_TEMPLATE_CHARACTERS = 2**20
STRIKES = 3
"""Number of conversations that may hit the time limit before the template is not tried again."""

_REPAIR = "correct the chat template beside the tokenizer, or give the prompt as plain text (--no-chat)"
_ARGUMENTS = "give roles in the order the model was trained on, and check chat_template_kwargs"


class TextTokenizer(Protocol):
    """The part of a transformers tokenizer that prompts need."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. `spans`: character ranges the template marks as generated; None if it marks none."""

    text: str
    spans: tuple[tuple[int, int], ...] | None = None


class ChatTemplate:
    """One tokenizer's template. `variables` are passed for every conversation: the special tokens by name."""

    def __init__(self, source: str | Mapping[str, str], variables: Mapping[str, Any]) -> None:
        self._source = source
        self._variables = dict(variables)
        self._compiled: dict[str, Any] = {}
        self._strikes = 0

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """The template of a transformers tokenizer; None if it has none."""
        source = getattr(tokenizer, "chat_template", None)
        return cls(source, tokenizer.special_tokens_map) if source else None

    @property
    def marks_answers(self) -> bool:
        sources = [self._source] if isinstance(self._source, str) else self._source.values()
        return any("endgeneration" in source for source in sources)

    def render(
        self,
        messages: Sequence[Message],
        kwargs: Mapping[str, Any],
        *,
        answer_next: bool,
        marked: bool = False,
    ) -> Rendered:
        """Render a conversation; `RequestError` if the template refuses it or does not end.

        `answer_next` adds the beginning of the assistant's turn. `marked` determines `spans`.
        """
        marks = tuple(f"\0{secrets.token_hex(8)}{end}" for end in "<>") if marked else None
        variables = {"tools": None, "documents": None} | self._variables | dict(kwargs)
        variables |= {"messages": [dict(m) for m in messages], "add_generation_prompt": answer_next, MARKS: marks}
        text = self._limited({k: v for k, v in variables.items() if k != MARKS or v is not None})
        return Rendered(text) if marks is None else _without(marks, text)

    def _limited(self, variables: dict[str, Any]) -> str:
        what = f"the chat template has not ended after {MAX_SECONDS:.0f} seconds"
        if self._strikes >= STRIKES:
            raise RequestError(what, why=f"it has not {STRIKES} times, and is not tried again", remedy=_REPAIR)
        try:
            with time_limit(MAX_SECONDS):
                return str(self._template(variables["tools"]).render(**variables))
        except TimeExpired:
            self._strikes += 1
            raise RequestError(what, why="a loop in it, or the conversation, is too long", remedy=_REPAIR) from None
        except (TooLarge, MemoryError) as error:
            what = "the chat template's output is too large"
            raise RequestError(what, why=str(error) or "out of memory", remedy=_REPAIR) from error
        except Exception as error:
            why = (str(error) or type(error).__name__)[:500]
            raise RequestError("the chat template refused the messages", why=why, remedy=_ARGUMENTS) from error

    def _template(self, tools: Any) -> Any:
        source = self._source if isinstance(self._source, str) else _chosen(self._source, tools)
        if source not in self._compiled:
            if len(source) > MAX_TEMPLATE_CHARACTERS:
                raise TooLarge(f"the template itself has {len(source):,} characters")
            self._compiled[source] = environment().from_string(source)
        return self._compiled[source]


def encode_prompt(tokenizer: TextTokenizer, template: ChatTemplate | None, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt, by the same rule for engines, training and evaluation.

    A text goes through the template if there is one, unless `prompt.chat` says otherwise. A conversation always does.
    `RequestError` if that is not possible.
    """
    through = template is not None if prompt.chat is None else prompt.chat
    if not through and not isinstance(prompt.content, str):
        raise RequestError("messages need the chat template", remedy="pass --chat, or a plain prompt")
    if not through:
        assert isinstance(prompt.content, str)
        return encode_text(tokenizer, prompt.content)
    if template is None:
        remedy = "give a plain `prompt`; on the command line, pass --no-chat"
        raise RequestError("the tokenizer has no chat template", remedy=remedy)
    text = template.render(prompt.as_messages(), prompt.template_kwargs, answer_next=True).text
    return encode_text(tokenizer, text, add_special_tokens=False)


def encode_text(tokenizer: TextTokenizer, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Token ids of a text; `RequestError` for surrogates, which is how arguments that are not UTF-8 arrive."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        why = f"character {error.start + 1} is {text[error.start]!a}, half a surrogate pair or a byte"
        raise RequestError("the prompt is not valid Unicode", why=why, remedy="give it in UTF-8") from error
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _chosen(sources: Mapping[str, str], tools: Any) -> str:
    """Some models have several templates by name."""
    name = "tool_use" if tools is not None and "tool_use" in sources else "default"
    if name not in sources:
        raise ValueError(f"the tokenizer has the templates {', '.join(sources)}, and none is the default")
    return sources[name]


def _without(marks: tuple[str, ...], text: str) -> Rendered:
    """Remove the marks, and return their positions as spans."""
    pieces, spans, size = text.split(marks[0]), [], 0
    for i, piece in enumerate(pieces):
        if i:
            inside, mark, piece = piece.partition(marks[1])
            if not mark:
                raise RequestError("the chat template marks answers within answers", remedy=_REPAIR)
            spans.append((size, size + len(inside)))
            size += len(inside)
            pieces[i] = inside + piece
        size += len(piece)
    return Rendered("".join(pieces), tuple(spans))
