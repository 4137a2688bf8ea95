"""The built-in set, files of prompts, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.engines import make_runner
from trtllm_redrafter.benchmark.prompts import built_in_prompts, choose, make_items, question_of, read_prompts
from trtllm_redrafter.errors import InputError, MismatchError


def test_built_in_set() -> None:
    prompts = built_in_prompts()
    counts = Counter(p.category for p in prompts)
    assert len(prompts) == 80 and len(counts) == 6 and set(counts.values()) == {13, 14}
    assert len({p.prompt.as_text() for p in prompts}) == 80
    chats = [p.prompt for p in prompts if p.category == "multi-turn conversation"]
    assert chats and all(len(prompt.as_messages()) == 3 for prompt in chats)


def test_choosing_keeps_every_category() -> None:
    chosen = choose(built_in_prompts(), 12)
    assert len(chosen) == 12 and len({p.category for p in chosen}) == 6
    assert choose(chosen, 50) == choose(chosen, None) == chosen


def test_three_kinds_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    lines = [
        {"prompt": "x"},
        {"messages": messages, "id": "m", "category": "chat"},
        {"question_id": 81, "turns": ["1", "2"]},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    one, two, three = read_prompts(file)
    assert (one.prompt_id, one.category, one.prompt.content) == ("line-1", "other", "x")
    assert (two.prompt_id, two.category, two.prompt.content) == ("m", "chat", tuple(messages))
    assert (three.prompt_id, three.prompt.content, three.prompt.later) == ("81", "1", ("2",))


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a"}\nnot json\n{"category": "c"}\n[1]\n{"prompt": ""}\n'
    )
    with pytest.raises(InputError) as caught:
        read_prompts(file)
    text = caught.value.render()
    assert all(f"line {n}" in text for n in (2, 3, 4, 5, 6)) and "stands twice" in text and "line 1:" not in text
    file.write_text("\n")
    with pytest.raises(InputError, match="has no lines"):
        read_prompts(file)
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "absent.jsonl")


def test_turns_are_answered_and_long_prompts_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"question_id": 1, "turns": ["Hi", "And?"]}\n')
    runner = make_runner(tmp_path, tokenizer=True, vocab_size=259)
    items = make_items(runner, read_prompts(file), max_tokens=5)
    assert [i.item_id for i in items] == ["1-turn-1", "1-turn-2"]
    assert len(items[1].token_ids) > len(items[0].token_ids)
    assert {question_of(i.item_id) for i in items} == {"1"}
    with pytest.raises(MismatchError, match="tokens, the engine takes"):
        make_items(runner, read_prompts(file), max_tokens=190)
