"""Requests and results, the same for every backend, and why an engine may refuse one.

Request(token_ids, SamplingParams(max_tokens=64))  ->  Update, Update, ... , the last one with its Result
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trtllm_redrafter.base_models.tokenizer import beyond_message, first_beyond
from trtllm_redrafter.errors import Problem, RedrafterError, brief
from trtllm_redrafter.prompts.sampling import SamplingParams
from trtllm_redrafter.redrafter.config import DraftShape


class FinishReason(str, enum.Enum):
    """Why a request ended; the values are the OpenAI API's, plus `cancelled` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Request:
    """One prompt, already tokenized, and how to continue it."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    request_id: str | None = None
    draft: bool = True
    """False: decode this request autoregressively, by the same code with trees of one node."""


def acceptance_length(steps: int, accepted_tokens: int) -> float | None:
    """Mean number of tokens that a decoding step emits, the guaranteed one included; None without a step."""
    return None if steps == 0 else 1.0 + accepted_tokens / steps


@dataclass(kw_only=True)
class SpecDecodingStats:
    """Decoding steps of the base model and what they accepted, of one request or of many. The terms are vLLM's.

    The first token of a text comes from the prefill and belongs to no step. `drafted_tokens` counts the positions that
    a step could accept (the draft length, however many beams propose them), on every backend.
    """

    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    """[j]: steps that accepted at least j + 1 drafts. Empty if not known."""

    def add_step(self, *, drafted: int, accepted: int) -> None:
        self.steps += 1
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        for position in range(min(accepted, len(self.accepted_per_position))):
            self.accepted_per_position[position] += 1

    def add(self, other: SpecDecodingStats) -> None:
        """Count the steps of another request as well. Positions that are not known for one are not known for both."""
        known = all(stats.accepted_per_position or not stats.drafted_tokens for stats in (self, other))
        pairs = zip_longest(self.accepted_per_position, other.accepted_per_position, fillvalue=0)
        self.accepted_per_position = [mine + theirs for mine, theirs in pairs] if known else []
        self.steps += other.steps
        self.drafted_tokens += other.drafted_tokens
        self.accepted_tokens += other.accepted_tokens

    @property
    def acceptance_length(self) -> float | None:
        """Mean number of tokens per step; see `acceptance_length`."""
        return acceptance_length(self.steps, self.accepted_tokens)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that were accepted; None if nothing was drafted."""
        return None if self.drafted_tokens == 0 else self.accepted_tokens / self.drafted_tokens

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """[j]: share of the steps that accepted at least j + 1 drafts."""
        return [count / self.steps for count in self.accepted_per_position] if self.steps else []

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "accepted_per_position": self.accepted_per_position,
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_rate_per_position": self.acceptance_rate_per_position,
        }


@dataclass
class Result(SpecDecodingStats):
    """A finished request: what was written, and how.

    Times are seconds; the time of a step that served several requests is given to each of them.
    """

    request_id: str
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the text; None: an end token of the model, or no stop at all."""
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    error: RedrafterError | None = None
    """Why the request ended early (`FinishReason.ERROR`); tokens and text are what was written until then."""

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed: tokens after the first, over the decode time."""
        if self.decode_seconds <= 0.0 or len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / self.decode_seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": None if self.finish_reason is None else self.finish_reason.value,
            "stop_reason": self.stop_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.token_ids),
            **super().as_dict(),
            "queue_seconds": self.queue_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class Update:
    """What one step added to one request. `text` can lag behind `token_ids` (half a character, half a stop string)."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    result: Result | None = None
    """Set once, with the last update of the request."""


@dataclass(frozen=True)
class EngineInfo:
    """What callers need to know about a loaded engine."""

    path: Path
    backend: str
    device: str
    dtype: str
    vocab_size: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    draft_shape: DraftShape | None
    """None: no drafter; the engine decodes autoregressively."""


def ignored_options(sampling: SamplingParams, supported: Sequence[str], why: str) -> list[Problem]:
    """A problem for each option that is set and would have no effect."""
    options = [option for option in fields(sampling) if option.name not in supported]
    values = {option.name: getattr(sampling, option.name) for option in options}
    given = [option.name for option in options if values[option.name] != option.default]
    return [Problem(f"{name} is {values[name]}", None, why, "leave it out") for name in given]


def limit_problems(request: Request, info: EngineInfo, *, has_tokenizer: bool) -> list[Problem]:
    """Values that are out of range or exceed the engine's limits, found before any work."""
    count, sampling = len(request.token_ids), request.sampling
    found = sampling.problems()
    if count == 0:
        found.append(Problem("the prompt is empty", remedy="give at least one token"))
    beyond = first_beyond(request.token_ids, vocab_size=info.vocab_size)
    if beyond is not None:
        found.append(Problem(beyond_message(beyond, vocab_size=info.vocab_size), remedy="leave that token out"))
    if count > info.max_input_len:
        what = f"the prompt has {count} tokens, the engine takes {info.max_input_len}"
        found.append(Problem(what, remedy="shorten it, or build with a larger --max-input-len"))
    if isinstance(sampling.max_tokens, int) and count + sampling.max_tokens > info.max_seq_len:
        what = f"{count} prompt tokens and {brief(sampling.max_tokens)} to write exceed the engine's {info.max_seq_len}"
        left = max(0, info.max_seq_len - count)
        found.append(Problem(what, remedy=f"ask for at most {left} tokens, or build with a larger --max-seq-len"))
    unknown = [t for t in sampling.stop_token_ids if isinstance(t, int) and t >= info.vocab_size]
    if unknown:
        found.append(Problem(f"stop_token_ids has {brief(unknown[0])}, outside the vocabulary of {info.vocab_size}"))
    if sampling.stop and not has_tokenizer:
        found.append(Problem("stop strings need a tokenizer", remedy="build the engine with --tokenizer"))
    return found
