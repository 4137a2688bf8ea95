"""Parse a line of a file into a prompt: one normaliser for all forms of prompts and conversations.

    {"prompt": "Why is the sky blue?"}
    {"messages": [{"role": "user", "content": "Hello"}]}                            OpenAI, also with text parts
    {"messages": [..., {"role": "assistant", "content": null, "tool_calls": [...]}, {"role": "tool", ...}]}
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]}        ShareGPT
    {"question_id": 81, "category": "writing", "turns": ["...", "..."]}             Spec-Bench

Messages are returned as templates expect them: `role`, `content` as text (None only with tool calls), and all other
keys of a message unchanged.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from trtllm_redrafter.errors import InputError, brief
from trtllm_redrafter.prompts.sampling import SamplingParams

Message = Mapping[str, Any]

FORMS = ("prompt", "messages", "conversations", "turns")
"""A prompt has exactly one of these keys."""

KEYS = (
    *FORMS, "text", "id", "question_id", "category", "system", "tools", "chat", "chat_template_kwargs", "draft",
    *(option.name for option in fields(SamplingParams)),
)  # fmt: skip
"""All keys that any command reads. Each command ignores those of the others, so that one file works for all."""

RESERVED_KWARGS = ("messages", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template")
"""Template arguments set by the program itself."""

_ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant", "bard": "assistant",
    "bing": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Prompt:
    """The prompt of one line.

    `content` is a text or a conversation; `later` are user turns to ask after the answer. `chat` says whether a text
    goes through the chat template; None: if the model has one. `template_kwargs` are further template arguments.
    """

    content: str | tuple[Message, ...]
    later: tuple[str, ...] = ()
    chat: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def with_template_kwargs(self, defaults: Mapping[str, Any]) -> Prompt:
        """The prompt with further template arguments, unless it has its own of the same names."""
        return replace(self, template_kwargs={**defaults, **self.template_kwargs})

    def for_model(self, *, has_template: bool) -> Prompt:
        """The prompt for a model with or without a chat template: without one, a conversation becomes plain text."""
        if has_template and self.chat is not False:
            return replace(self, chat=True)
        return replace(self, content=self.as_text(), chat=False)

    def as_messages(self) -> list[Message]:
        """The conversation; a text is a single user message."""
        return [{"role": "user", "content": self.content}] if isinstance(self.content, str) else list(self.content)

    def as_text(self) -> str:
        """Input for a model without a chat template: the messages' contents, line by line."""
        return "\n".join(str(m["content"] or "") for m in self.as_messages())


def parse_prompt(values: Mapping[str, Any]) -> Prompt:
    """The prompt of a line; `InputError` without a position, which the caller adds (`error.at`)."""
    check_characters(values)
    forms = [key for key in FORMS if key in values]
    if "text" in values and not forms:
        raise InputError(
            "the line is a text to learn from, not a prompt", remedy='write {"prompt": "…"} to continue it'
        )
    if len(forms) != 1:
        what = f"the line needs exactly one of {', '.join(f'`{key}`' for key in FORMS)}"
        why = f"it has {' and '.join(forms)}" if forms else _mistyped(values)
        raise InputError(what, why=why, remedy='write {"prompt": "…"}')
    kwargs = template_kwargs(values)
    form, chat = forms[0], values.get("chat")
    if chat is not None and not isinstance(chat, bool):
        raise InputError(f"`chat` is {brief(chat)}", remedy="write true or false")
    if form == "prompt":
        if not isinstance(values["prompt"], str):
            raise InputError("`prompt` is not a string", remedy="put the text into quotes")
        return Prompt(_after_system(values, values["prompt"]), (), chat, kwargs)
    if chat is False:
        raise InputError(f"`{form}` cannot go without the chat template", remedy="remove `chat`, or give a `prompt`")
    if form == "turns":
        turns = values["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t for t in turns):
            raise InputError("`turns` is not a list of texts", remedy='write {"turns": ["…", "…"]}')
        return Prompt(_after_system(values, turns[0]), tuple(turns[1:]), None, kwargs)
    return Prompt(conversation(values), (), True, kwargs)


def _mistyped(values: Mapping[str, Any]) -> str | None:
    """A key that is probably a misspelt prompt key, if there is one."""
    for key in values:
        near = difflib.get_close_matches(key, FORMS, 1) if key not in KEYS else []
        if near:
            return f"unknown key {brief(key)}; did you mean {near[0]!r}?"
    return None


def check_asks(prompt: Prompt) -> Prompt:
    """`InputError` for prompts useless for measuring and training: empty, or already answered."""
    if prompt.content == "":
        raise InputError("`prompt` is empty", remedy="give it some text")
    if not isinstance(prompt.content, str) and prompt.content[-1]["role"] == "assistant":
        remedy = "remove that turn: the model writes it"
        raise InputError("the conversation ends with an assistant's turn, nothing is asked", remedy=remedy)
    return prompt


def conversation(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a line with `messages` or `conversations`, normalised."""
    form = "messages" if "messages" in values else "conversations"
    found = values[form]
    if not isinstance(found, list) or not found:
        remedy = 'write [{"role": "user", "content": "…"}]'
        raise InputError(f"`{form}` is not a conversation: a list of messages", remedy=remedy)
    messages = tuple(_message(m, f"message {i}") for i, m in enumerate(found, start=1))
    return (*_system(values), *messages)


def normalise(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation passed as Python objects."""
    return conversation({"messages": [dict(m) if isinstance(m, Mapping) else m for m in messages]})


def template_kwargs(values: Mapping[str, Any]) -> dict[str, Any]:
    """`chat_template_kwargs` of a line, including its `tools`."""
    given = values.get("chat_template_kwargs")
    found = check_template_kwargs({} if given is None else given)
    tools = values.get("tools")
    if tools is None:
        return found
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError("`tools` is not a list of objects", remedy="give JSON schemas, as for the OpenAI API")
    return {"tools": tools, **found}


def check_template_kwargs(values: Any) -> dict[str, Any]:
    """Check the arguments a user passes to a chat template, by name."""
    if not isinstance(values, dict) or not all(isinstance(key, str) and key.isidentifier() for key in values):
        remedy = 'write {"enable_thinking": false}'
        raise InputError("`chat_template_kwargs` is not an object of named values", remedy=remedy)
    if not _keys_are_texts(values):
        what = "`chat_template_kwargs` has an object with a key that is no text"
        raise InputError(what, why="as JSON has it, every key is one", remedy="put the key into quotes")
    for key in RESERVED_KWARGS:
        if key in values:
            raise InputError(f"`chat_template_kwargs` has {key!r}", why="the program sets it", remedy="leave it out")
    return dict(values)


def _keys_are_texts(value: Any) -> bool:
    """YAML and Python have other keys; results and fingerprints are JSON."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(map(_keys_are_texts, value.values()))
    return all(map(_keys_are_texts, value)) if isinstance(value, (list, tuple)) else True


def check_characters(values: Mapping[str, Any]) -> None:
    """Refuse lone surrogates ("\\ud83d"), which are valid JSON, but which no tokenizer can encode."""
    for key in KEYS:
        if key in values:
            try:
                json.dumps(values[key], ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError as e:
                half = f"\\u{ord(e.object[e.start]):04x}"
                raise InputError(
                    f"`{key}` has half a surrogate pair, {half}", why="it stands for no character",
                    remedy="write the whole pair, or remove it",
                ) from e  # fmt: skip


def own_id(values: Mapping[str, Any]) -> str | None:
    """A line's own id as text, or None."""
    value = values.get("id", values.get("question_id"))
    return value if value is None or isinstance(value, str) else brief(value)


def _system(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The line's own `system` text, which ShareGPT files have outside the conversation."""
    text = values.get("system")
    if text is None or text == "":
        return ()
    if not isinstance(text, str):
        raise InputError("`system` is not a string", remedy="put the text into quotes")
    return ({"role": "system", "content": text},)


def _after_system(values: Mapping[str, Any], text: str) -> str | tuple[Message, ...]:
    system = _system(values)
    return (*system, {"role": "user", "content": text}) if system else text


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise InputError(f"{name} is not an object", remedy='write {"role": "user", "content": "…"}')
    if "role" not in value and "from" in value:
        value = _from_sharegpt(value, name)
    if not isinstance(value.get("role"), str):
        raise InputError(f"{name} has no `role`", remedy='write {"role": "user", "content": "…"}')
    calls = value.get("tool_calls") or value.get("function_call")
    message = {**value, "content": _content(value.get("content"), name, value, has_calls=bool(calls))}
    if isinstance(value.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in value["tool_calls"]]
    return message


def _from_sharegpt(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    role = _ROLES.get(str(value["from"]).lower())
    if role is None:
        raise InputError(f"{name} is from {brief(value['from'])}", remedy="use human, gpt, system or tool")
    rest = {key: v for key, v in value.items() if key not in ("from", "value")}
    return {"role": role, "content": value.get("value"), **rest}


def _content(content: Any, name: str, value: Mapping[str, Any], *, has_calls: bool) -> str | None:
    if isinstance(content, str):
        return content
    if content is None:
        if has_calls:
            return None
        what = "is null" if "content" in value else "is missing"
        raise InputError(
            f"{name}, of the role {brief(value['role'])}: `content` {what}",
            remedy="give a text; only a message with tool_calls goes without",
        )
    if not isinstance(content, list):
        raise InputError(f"{name}: `content` is neither a text nor a list of parts", remedy='write "content": "…"')
    return "".join(_part(part, f"{name}, part {i}") for i, part in enumerate(content, start=1))


def _part(part: Any, name: str) -> str:
    """Text of a content part. Parts are concatenated unchanged, as templates that accept parts do."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind is not None and kind not in _TEXT_PARTS:
        raise InputError(f"{name} is of the type {brief(kind)}", why="only text can be read", remedy="remove it")
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise InputError(f"{name} is no text", remedy='write {"type": "text", "text": "…"}')
    return str(part["text"])


def _call(call: Any) -> Any:
    """Parse a call's arguments: OpenAI has them as a JSON string, templates expect the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
