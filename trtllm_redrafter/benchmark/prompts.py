"""What a benchmark asks: a built-in set over six task families, a user's JSONL file, or Spec-Bench's questions.

Acceptance depends on the text: a translation drafts differently from a story. So every prompt has a category, and
results are shown for each.

    {"prompt": "Translate: ...", "category": "translation"}
    {"messages": [{"role": "user", "content": "..."}, ...], "id": "support-3"}
    {"question_id": 81, "category": "writing", "turns": ["...", "..."]}          Spec-Bench's question file
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import Request, Runner, SamplingParams
from trtllm_redrafter.errors import InputError, MismatchError, Problem, raise_together

BUILT_IN = "built-in"
UNNAMED = "other"
_TURN = "-turn-"
_LAST_TURN = re.compile(rf"{_TURN}\d+$")
SHOWN = 20
"""Problems of one file that a message lists."""


@dataclass(frozen=True)
class BenchPrompt:
    """One conversation. `turns` are user messages still to be answered in turn; `earlier` came before them."""

    prompt_id: str
    category: str
    earlier: tuple[Mapping[str, str], ...]
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One measured request: its tokens, ready to submit."""

    item_id: str
    category: str
    token_ids: tuple[int, ...]


def built_in_prompts() -> list[BenchPrompt]:
    """Eighty prompts written for this project."""
    text = files("trtllm_redrafter.benchmark").joinpath("prompts.jsonl").read_text(encoding="utf-8")
    return _parse(text, BUILT_IN)


def read_prompts(path: Path) -> list[BenchPrompt]:
    """Prompts of a JSONL file; `InputError` names every bad line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot read the prompts", where=path, why=str(error), remedy="check --prompts") from error
    return _parse(text, str(path))


def _parse(text: str, source: str) -> list[BenchPrompt]:
    found: dict[str, BenchPrompt] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompt = _prompt(json.loads(line), f"line-{number}")
            if prompt.prompt_id in found:
                raise ValueError(f"the id {prompt.prompt_id!r} stands twice")
            found[prompt.prompt_id] = prompt
        except (ValueError, RecursionError) as error:
            remedy = 'write {"prompt": "…", "category": "…"}, one object per line'
            problems.append(Problem(str(error), f"{source}, line {number}", remedy=remedy))
    more = len(problems) - SHOWN
    if more > 0:
        problems = [*problems[:SHOWN], Problem(f"and {more} more lines like these", source)]
    raise_together(InputError, problems, "the prompts cannot be used", where=source)
    if not found:
        raise InputError("the file holds no prompts", where=source, remedy="write one JSON object per line")
    return list(found.values())


def _prompt(value: Any, fallback: str) -> BenchPrompt:
    if not isinstance(value, dict):
        raise ValueError("the line is not a JSON object")
    kinds = [key for key in ("prompt", "messages", "turns") if key in value]
    if len(kinds) != 1:
        raise ValueError("the line needs exactly one of `prompt`, `messages` and `turns`")
    messages, turns = _messages(kinds[0], value[kinds[0]])
    prompt_id = str(value.get("id", value.get("question_id", fallback)))
    return BenchPrompt(prompt_id, str(value.get("category", UNNAMED)), messages, turns)


def _messages(kind: str, value: Any) -> tuple[tuple[Mapping[str, str], ...], tuple[str, ...]]:
    """Earlier messages, and the user turns to answer."""
    if kind == "prompt":
        value = [value]
    if kind in ("prompt", "turns"):
        if not isinstance(value, list) or not value or not all(isinstance(t, str) and t for t in value):
            raise ValueError(f"`{kind}` is not text")
        return (), tuple(value)
    good = isinstance(value, list) and value and all(isinstance(m, dict) for m in value)
    if not good or not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value):
        raise ValueError("`messages` is not a conversation")
    if value[-1]["role"] != "user":
        raise ValueError("`messages` must end with a user's turn")
    return tuple({"role": m["role"], "content": m["content"]} for m in value[:-1]), (value[-1]["content"],)


def make_items(runner: Runner, prompts: Sequence[BenchPrompt], *, max_tokens: int) -> list[Item]:
    """Tokenize, answering earlier turns greedily without drafting, so that both sides are asked the very same.

    `MismatchError` names every prompt the engine has no room for, before anything is measured.
    """
    items, problems = [], []
    for prompt in prompts:
        try:
            items += _items_of(runner, prompt, max_tokens)
        except _TooLong as error:
            problems.append(Problem(f"{prompt.prompt_id}: {error}", remedy="shorten it, or build for longer texts"))
    raise_together(MismatchError, problems[:SHOWN], "prompts do not fit the engine", where=runner.info.path)
    return items


class _TooLong(Exception):
    """A prompt and its answer exceed the engine's lengths."""


def _items_of(runner: Runner, prompt: BenchPrompt, max_tokens: int) -> list[Item]:
    messages, items = list(prompt.earlier), []
    for number, turn in enumerate(prompt.turns):
        messages.append({"role": "user", "content": turn})
        ids = _encode(runner, messages)
        room = min(runner.info.max_input_len, runner.info.max_seq_len - max_tokens)
        if len(ids) > room:
            raise _TooLong(f"{len(ids)} tokens, the engine has room for {room} beside {max_tokens} written ones")
        name = prompt.prompt_id if len(prompt.turns) == 1 else f"{prompt.prompt_id}{_TURN}{number + 1}"
        items.append(Item(name, prompt.category, ids))
        if number + 1 < len(prompt.turns):
            [answer] = runner.generate([Request(ids, SamplingParams(max_tokens), draft=False)])
            messages.append({"role": "assistant", "content": answer.text})
    return items


def question_of(item_id: str) -> str:
    """The prompt that an item is a turn of."""
    return _LAST_TURN.sub("", item_id)


def _encode(runner: Runner, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Through the chat template; an engine without one gets the plain texts, line by line."""
    if runner.has_chat_template:
        return runner.encode_prompt(list(messages), chat=True)
    return runner.encode_prompt("\n".join(m["content"] for m in messages), chat=False)


def choose(prompts: Sequence[BenchPrompt], count: int | None) -> list[BenchPrompt]:
    """`count` prompts spread evenly over the list, so that every category stays in; None: all."""
    if count is None or count >= len(prompts):
        return list(prompts)
    return [prompts[i * len(prompts) // count] for i in range(count)]
