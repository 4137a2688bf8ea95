"""Prompts as jobs: from a list, or from a JSONL file line by line; and what finished jobs amount to.

One bad line must not cost ten thousand others: it becomes a job with an error, which names the line and what is wrong
with it, and the rest run.

    {"prompt": "Why is the sky blue?", "max_tokens": 64}
    {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.7, "seed": 1}
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import Result
from trtllm_redrafter.backends.requests import SpecDecodingStats
from trtllm_redrafter.errors import InputError, RedrafterError, brief
from trtllm_redrafter.prompts.files import parse_lines
from trtllm_redrafter.prompts.jsonl import read_lines
from trtllm_redrafter.prompts.messages import Prompt, own_id, parse_prompt
from trtllm_redrafter.prompts.sampling import SamplingParams, sampling_values


@dataclass
class Job:
    """One prompt of a run: what is asked, and once it has run, its result or the error that kept it from running.

    `where` names its source for messages: `line 3 of prompts.jsonl`.
    """

    job_id: str
    where: str
    prompt: Prompt
    sampling: SamplingParams
    draft: bool = True
    result: Result | None = None
    error: RedrafterError | None = None

    def failed(self, error: RedrafterError) -> Job:
        """This job with an error that names its source."""
        self.error = error.at(self.where)
        return self

    def as_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"id": self.job_id, "source": self.where, "error": self.error.as_dict()}
        assert self.result is not None
        values = self.result.as_dict()
        del values["request_id"]
        return {"id": self.job_id, "source": self.where, **values}


def prompt_jobs(prompts: Sequence[str], defaults: Job) -> list[Job]:
    """Jobs of texts; everything but the text comes from `defaults`."""
    return [
        replace(defaults, job_id=f"prompt-{i}", where=f"prompt {i}", prompt=replace(defaults.prompt, content=text))
        for i, text in enumerate(prompts, start=1)
    ]


def read_jobs(path: Path, defaults: Job) -> Iterator[Job]:
    """Jobs of a JSON Lines file or stream, line by line; a line that is unusable becomes a job with its error."""

    def line_job(number: int) -> Job:
        return replace(defaults, job_id=f"line-{number}", where=f"{path}, line {number}")

    def parse(number: int, values: Mapping[str, Any]) -> Job:
        return _with_values(line_job(number), values)

    for number, found in parse_lines(read_lines(path), path, parse):
        yield found if isinstance(found, Job) else line_job(number).failed(found)


def _with_values(job: Job, values: Mapping[str, Any]) -> Job:
    """The job with a line's values, which override the defaults."""
    prompt = parse_prompt(values)
    if prompt.later:
        remedy = "give each turn a line of its own, or use `bench`, which asks one after the other"
        raise InputError("`turns` has several turns", remedy=remedy)
    chat = job.prompt.chat if prompt.chat is None else prompt.chat
    prompt = replace(prompt, chat=chat).with_template_kwargs(job.prompt.template_kwargs)
    return replace(
        job,
        job_id=own_id(values) or job.job_id,
        prompt=prompt,
        sampling=replace(job.sampling, **sampling_values(values)),
        draft=_flag(values, "draft", job.draft),
    )


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    flag = values.get(key, default)
    if not isinstance(flag, bool):
        raise InputError(f"`{key}` is {brief(flag)}", remedy="write true or false")
    return flag


@dataclass
class RunSummary(SpecDecodingStats):
    """Figures over all finished jobs. `decode_tokens_per_second` is one request's own speed, averaged by time."""

    wall_seconds: float = 0.0
    prompts: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0
    exit_code: int = 0
    """0 while every prompt has a result, else that of the first failure."""
    _start: float = field(default_factory=time.perf_counter, repr=False)

    def add_job(self, job: Job) -> None:
        self.prompts += 1
        self.wall_seconds = time.perf_counter() - self._start
        if job.error is not None:
            self.failed += 1
            self.exit_code = self.exit_code or job.error.exit_code
            return
        assert job.result is not None
        result = job.result
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += len(result.token_ids)
        self.decoded_tokens += max(0, len(result.token_ids) - 1)
        self.add(result)
        self.prefill_seconds += result.prefill_seconds
        self.decode_seconds += result.decode_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """All tokens over all time, prompts included: what a user with this batch waits for."""
        return self.completion_tokens / self.wall_seconds if self.wall_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "failed": self.failed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            **super().as_dict(),
            "wall_seconds": self.wall_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }
