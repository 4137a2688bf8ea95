"""Prompts as jobs: from a list, or from a JSONL file line by line.

One bad line must not cost the night's other ten thousand: it becomes an outcome of its own, with its line number
and what is wrong with it, and the rest run.

    {"prompt": "Why is the sky blue?", "max_tokens": 64}
    {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.7, "seed": 1}
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import Result, SamplingParams
from trtllm_redrafter.errors import InputError, RedrafterError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

_NUMBERS: dict[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int, type(None)),
}
_KEYS = ("id", "prompt", "messages", *_NUMBERS, "stop", "ignore_eos", "draft", "chat")


@dataclass(frozen=True)
class Job:
    """One prompt to run. `where` names its source for messages: `line 3 of prompts.jsonl`."""

    job_id: str
    where: str
    prompt: Prompt
    sampling: SamplingParams
    draft: bool
    chat: bool


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a result, or the error that kept it from running."""

    job_id: str
    where: str
    result: Result | None = None
    error: RedrafterError | None = None

    def as_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"id": self.job_id, "source": self.where, "error": self.error.as_dict()}
        assert self.result is not None
        values = self.result.as_dict()
        del values["request_id"]
        return {"id": self.job_id, "source": self.where, **values}


@dataclass(frozen=True)
class Defaults:
    """What a prompt gets unless its line says otherwise."""

    sampling: SamplingParams
    draft: bool
    chat: bool


def prompt_jobs(prompts: Sequence[str], defaults: Defaults) -> list[Job]:
    return [
        Job(f"prompt-{i}", f"prompt {i}", prompt, defaults.sampling, defaults.draft, defaults.chat)
        for i, prompt in enumerate(prompts, start=1)
    ]


def read_jobs(path: Path, defaults: Defaults) -> Iterator[Job | Outcome]:
    """Jobs of a JSONL file, line by line; a line that is none becomes an outcome with its error. Blank lines pass."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _read_line(line, f"{path}, line {number}", f"line-{number}", defaults)
    except OSError as e:
        raise InputError("cannot read the prompts", where=path, why=str(e), remedy="check the path") from e


def _read_line(line: bytes, where: str, job_id: str, defaults: Defaults) -> Job | Outcome:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()  # "\\ud800" is valid JSON, and no text that can be tokenized
    except (ValueError, RecursionError) as e:
        remedy = "write one JSON object per line, in UTF-8"
        return Outcome(job_id, where, error=InputError("the line is not JSON", where=where, why=str(e), remedy=remedy))
    try:
        return _job_of(value, where, job_id, defaults)
    except InputError as error:
        return Outcome(job_id, where, error=error)


def _job_of(value: Any, where: str, job_id: str, defaults: Defaults) -> Job:
    def refuse(what: str, remedy: str) -> InputError:
        return InputError(what, where=where, remedy=remedy)

    if not isinstance(value, dict):
        raise refuse("the line is not a JSON object", 'write {"prompt": "…"}')
    for key in value:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            raise refuse(f"unknown key {key!r}", f"did you mean {near[0]!r}?" if near else f"use {', '.join(_KEYS)}")
    if ("prompt" in value) == ("messages" in value):
        raise refuse("the line needs either `prompt` or `messages`", 'write {"prompt": "…"}')
    if "prompt" in value and not isinstance(value["prompt"], str):
        raise refuse("`prompt` is not a string", "put the text into quotes")
    if "messages" in value and not _are_messages(value["messages"]):
        raise refuse("`messages` is not a conversation", 'write [{"role": "user", "content": "…"}]')
    chat = _flag(value, "chat", True if "messages" in value else defaults.chat, refuse)
    if "messages" in value and not chat:
        raise refuse("`messages` cannot go without the chat template", "remove `chat`, or give a `prompt`")
    return Job(
        job_id=job_id if value.get("id") is None else str(value["id"]),
        where=where,
        prompt=value["prompt"] if "prompt" in value else value["messages"],
        sampling=replace(defaults.sampling, **_sampling_changes(value, refuse)),
        draft=_flag(value, "draft", defaults.draft, refuse),
        chat=chat,
    )


def _sampling_changes(value: Mapping[str, Any], refuse: Callable[[str, str], InputError]) -> dict[str, Any]:
    """The line's own sampling values, checked for type; their range is the engine's to check."""
    changes: dict[str, Any] = {}
    for key, types in _NUMBERS.items():
        if key in value:
            if isinstance(value[key], bool) or not isinstance(value[key], types):
                raise refuse(f"`{key}` is {value[key]!r}", f"give a {'' if float in types else 'whole '}number")
            changes[key] = value[key]
    if "stop" in value:
        stop = [value["stop"]] if isinstance(value["stop"], str) else value["stop"]
        if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
            raise refuse("`stop` is neither a string nor a list of strings", 'write {"stop": ["…"]}')
        changes["stop"] = tuple(stop)
    if "ignore_eos" in value:
        changes["ignore_eos"] = _flag(value, "ignore_eos", False, refuse)
    return changes


def _flag(value: Mapping[str, Any], key: str, default: bool, refuse: Callable[[str, str], InputError]) -> bool:
    flag = value.get(key, default)
    if not isinstance(flag, bool):
        raise refuse(f"`{key}` is {flag!r}", "write true or false")
    return flag


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )
