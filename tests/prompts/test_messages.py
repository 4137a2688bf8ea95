"""Every form of a prompt or conversation, and what is refused of it."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_redrafter.errors import InputError, brief
from trtllm_redrafter.prompts.files import UnknownKeys
from trtllm_redrafter.prompts.messages import Prompt, check_asks, conversation, parse_prompt

USER = {"role": "user", "content": "hello world"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [USER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello "}, {"text": "world"}]}]},
        {"messages": [{"role": "user", "content": ["hello ", "world"]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "hello world"}]}]},
        {"conversations": [{"from": "human", "value": "hello world"}]},
        {"conversations": [{"from": "User", "value": [{"type": "text", "text": "hello world"}]}]},
        {"messages": [{"from": "human", "value": "hello world"}]},
    ],
)
def test_one_conversation_in_its_forms(line: dict[str, Any]) -> None:
    prompt = parse_prompt(line)
    assert prompt.content == (USER,) and prompt.chat is True and prompt.later == ()


def test_texts_and_turns() -> None:
    assert parse_prompt({"prompt": "x", "chat": False}) == Prompt("x", chat=False)
    assert parse_prompt({"turns": ["a", "b"], "question_id": 1}) == Prompt("a", ("b",))
    assert parse_prompt({"prompt": "x", "system": "s"}).as_messages() == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "x"},
    ]
    assert parse_prompt({"conversations": [{"from": "human", "value": "x"}], "system": "s"}).as_text() == "s\nx"


def test_tool_calls_go_without_content_and_their_arguments_are_objects() -> None:
    as_text = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [as_text]}, {"role": "tool", "content": "1"}]
    assert conversation({"messages": chat})[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert check_asks(parse_prompt({"messages": chat})).as_text() == "hello world\n\n1"
    tools = [{"type": "function", "function": {"name": "f"}}]
    kwargs = parse_prompt({"messages": chat, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}})
    assert kwargs.template_kwargs == {"tools": tools, "enable_thinking": False}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({}, "exactly one of"),
        ({"prompt": "a", "turns": ["b"]}, "it has prompt and turns"),
        ({"promt": "a"}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"text": "a"}, "to learn from, not a prompt"),
        ({"prompt": 1}, "not a string"),
        ({"prompt": "a", "chat": 1}, "`chat` is 1"),
        ({"messages": []}, "not a conversation"),
        ({"messages": ["a"]}, "message 1 is not an object"),
        ({"messages": [{"content": "a"}]}, "message 1 has no `role`"),
        ({"messages": [USER, {"role": "user", "content": None}]}, "message 2, of the role 'user': `content` is null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1, part 1 is no text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1 is from 'alien'"),
        ({"messages": [USER], "chat": False}, "without the chat template"),
        ({"prompt": "a\ud83d"}, "half a surrogate pair, .ud83d"),
        ({"prompt": "a", "chat_template_kwargs": {"messages": []}}, "the program sets it"),
        ({"prompt": "a", "chat_template_kwargs": [1]}, "not an object of named values"),
        ({"prompt": "a", "chat_template_kwargs": {"x": [{"y": 0, 2: 0}]}}, "a key that is no text"),
        ({"messages": [USER], "tools": "f"}, "`tools` is not a list"),
    ],
)
def test_refusals_name_what_is_wrong(line: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said.replace("?", r"\?")) as caught:
        parse_prompt(line)
    assert caught.value.problem.remedy


def test_surrogates_in_keys_nobody_reads_do_not_matter() -> None:
    assert parse_prompt({"prompt": "a", "comment": "\ud83d"}).content == "a"


def test_what_asks_nothing() -> None:
    answered = {"messages": [USER, {"role": "assistant", "content": "hi"}]}
    with pytest.raises(InputError, match="assistant's turn"):
        check_asks(parse_prompt(answered))
    with pytest.raises(InputError, match="empty"):
        check_asks(parse_prompt({"prompt": ""}))


def test_unknown_keys_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    notes = UnknownKeys("p.jsonl")
    notes.note({"prompt": "a", "temprature": 1, "category": "x", "draft": False}, 3)
    notes.note({"prompt": "b", "temprature": 1}, 4)
    [note] = caplog.messages
    assert note == "p.jsonl, line 3: the key 'temprature' is not known and not read; did you mean 'temperature'?"
    notes.note({f"key-{i}": i for i in range(100)}, 5)
    assert len(caplog.messages) == 21 and "not listed" in caplog.messages[-1]


def test_long_values_are_cut() -> None:
    assert brief(10**400).startswith("1000") and len(brief(10**400)) < 80
    assert brief(10**9999) == "a number of thousands of digits"
