"""What is learnt of a file, and what is said of a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import EOS
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.training.data import TokenizedText, read_prompts, read_texts
from trtllm_redrafter.training.frozen_base import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(counting_base: Path) -> Any:
    return load_tokenizer(counting_base)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def learnt(text: TokenizedText, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(text.token_ids[a:b]) for a, b in text.spans]


def test_only_the_assistants_tokens_are_learnt(tmp_path: Path, tokenizer: Any) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you.")]
    path = write(tmp_path / "chats.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    [text] = read_texts(path, tokenizer, max_tokens=500, eos=[EOS])
    assert learnt(text, tokenizer) == ["Hello.</s>", "See you.</s>"]
    assert text.rows == len("Hello.") + len("See you.") + 2


def test_plain_text_is_learnt_but_for_its_first_token(tmp_path: Path, tokenizer: Any) -> None:
    [text] = read_texts(write(tmp_path / "t.jsonl", {"text": "abc"}), tokenizer, max_tokens=500, eos=[EOS])
    assert learnt(text, tokenizer) == ["bc"]


def test_long_texts_are_cut(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "t.jsonl", {"text": "abcdefgh"}, {"text": "a"})
    [text] = read_texts(path, tokenizer, max_tokens=4, eos=[EOS])
    assert learnt(text, tokenizer) == ["bcd"]


def test_prompts_go_through_the_template(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "Why?", "category": "doubt"})
    [prompt] = read_prompts(path, tokenizer, max_tokens=100)
    assert tokenizer.decode(prompt.token_ids) == "<user>Why?</s>\n<assistant>"
    assert (prompt.category, prompt.line) == ("doubt", 1)


def test_bad_lines_are_named_together(tmp_path: Path, tokenizer: Any) -> None:
    path = write(
        tmp_path / "bad.jsonl",
        {"text": "fine"},
        "{not json",
        [1, 2],
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"other": 1},
        {"prompt": "Why?"},
    )
    with pytest.raises(InputError) as caught:
        read_texts(path, tokenizer, max_tokens=100, eos=[EOS])
    assert caught.value.problem.where == str(path)
    found = {str(p.where): p.what for p in caught.value.problems}
    assert sorted(found) == [f"line {n}" for n in (2, 3, 4, 5, 6, 7)]
    assert found["line 3"] == "the line is not a JSON object"
    assert "role" in found["line 4"] and "nothing to learn" in found["line 5"]
    assert "neither" in found["line 6"] and "without an answer" in found["line 7"]


def test_prompts_without_room_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "x" * 200}, {"prompt": ""})
    with pytest.raises(InputError, match=r"line 1: the prompt has \d+ tokens, more than 99") as caught:
        read_prompts(path, tokenizer, max_tokens=100)
    assert "line 2" in str(caught.value)


def test_empty_and_missing_files(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="the file has no lines"):
        read_texts(write(tmp_path / "empty.jsonl"), tokenizer, max_tokens=100, eos=[EOS])
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl", tokenizer, max_tokens=100)
