"""What every backend offers: build an engine from a checkpoint, run requests on it.

The checkpoint, request and result types are the same for both backends, so that moving from a laptop to a GPU
host changes one word. The core of a runner is `submit()` and `step()`: a request joins and leaves the running
batch between steps. `generate()` and `stream()`, written once in `Runner`, are loops around them, and the
HTTP server drives the same two calls.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_redrafter.errors import Problem, RequestError
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.redrafter.config import DraftShape

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_redrafter.backends.tensorrt_llm.options import TensorRTOptions
    from trtllm_redrafter.backends.tokenizer import EngineTokenizer
    from trtllm_redrafter.redrafter.beam_search import Beams


class FinishReason(str, enum.Enum):
    """Why a request ended; the values are the OpenAI API's, plus `cancelled`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch the filters off.

    The order is temperature, then top-k, then top-p on what is left, as in transformers and vLLM. `seed`
    fixes one uniform number per output position, so that the same seed gives the same text with and without
    drafting. `stop` strings end the text before their first occurrence, wherever token borders fall.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def problems(self) -> list[Problem]:
        """Everything that is out of range, for one message."""
        found = []
        if self.max_tokens < 1:
            found.append(Problem(f"max_tokens is {self.max_tokens}", remedy="ask for at least one token"))
        if not self.temperature >= 0.0 or self.temperature == float("inf"):
            found.append(Problem(f"temperature is {self.temperature}", remedy="use 0 for greedy, or a positive number"))
        if not 0 <= self.top_k < 2**31:
            found.append(Problem(f"top_k is {self.top_k}", remedy="use 0 to switch it off, or a number below 2**31"))
        if not 0.0 < self.top_p <= 1.0:
            found.append(Problem(f"top_p is {self.top_p}", remedy="use a number above 0 and up to 1"))
        if self.seed is not None and not 0 <= self.seed < 2**63:
            found.append(Problem(f"seed is {self.seed}", remedy="use 0 <= seed < 2**63"))
        if any(not s for s in self.stop):
            found.append(Problem("a stop string is empty", remedy="leave it out"))
        return found


@dataclass(frozen=True)
class Request:
    """One prompt, already tokenized, and how to continue it."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    request_id: str | None = None
    draft: bool = True
    """False decodes this request autoregressively, through the same code with an empty tree."""


def acceptance_length(steps: int, accepted_tokens: int) -> float | None:
    """Mean of tokens emitted per decoding step, the guaranteed one included; None without a step."""
    return None if steps == 0 else 1.0 + accepted_tokens / steps


@dataclass
class Result:
    """A finished request: what was written, and how.

    `acceptance_length` is the mean of tokens emitted per base-model decoding step, the guaranteed one included;
    the first token comes from the prefill and is not counted. `accepted_at[j]` counts steps in which at
    least j + 1 drafts were accepted. Times are seconds; the time of a step that served several requests is
    given to each of them.
    """

    request_id: str
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def acceptance_length(self) -> float | None:
        return acceptance_length(self.steps, self.accepted_tokens)

    @property
    def acceptance_rate(self) -> float | None:
        return None if self.drafted_tokens == 0 else self.accepted_tokens / self.drafted_tokens

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
            "steps": self.steps,
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "accepted_at": self.accepted_at,
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
    """What callers need to know of a loaded engine."""

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


@dataclass(frozen=True)
class Along:
    """What an engine computes along a given text of n tokens, one row before each of them."""

    logits: Tensor  # [n, V] float32
    states: Tensor | None
    """[n, H] in the engine's dtype, what its drafter reads; None where it does not show them."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that runners use."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...


class Runner(ABC):
    """An engine ready to run. Not thread-safe: one thread drives `step()`."""

    info: EngineInfo
    _tokenizer: EngineTokenizer | None

    @abstractmethod
    def submit(self, request: Request) -> str:
        """Queue a request and return its id.

        Raises `RequestError` before any work when the prompt is empty or too long, prompt + max_tokens exceed the
        engine, or a sampling value is out of range.
        """

    @abstractmethod
    def step(self) -> list[Update]:
        """Admit waiting requests, run one base-model step over the batch, return what it added."""

    @abstractmethod
    def cancel(self, request_id: str) -> Result | None:
        """Drop a request between steps; its partial result, or None if it is not known (any more)."""

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Is anything queued or running?"""

    @property
    def has_chat_template(self) -> bool:
        """Can prompts be rendered as chat turns?"""
        return self._tokenizer is not None and self._tokenizer.has_chat_template

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]], *, chat: bool) -> tuple[int, ...]:
        """Token ids of a prompt: plain text, or with `chat` through the chat template.

        Under `chat` a string is one user turn, a sequence is the conversation's messages (`role`, `content`).
        """
        if self._tokenizer is None:
            raise RequestError(
                "the engine has no tokenizer",
                where=self.info.path,
                remedy="build it with --tokenizer DIR, or submit token ids",
            )
        return self._tokenizer.encode_prompt(prompt, chat=chat)

    def autoregressive(self) -> Runner:
        """The runner to compare drafting with: this one, or one of the same weights that decodes faster undrafted.

        Where it is another one, it is closed by itself.
        """
        return self

    def along(self, prompt: Sequence[int], tokens: Sequence[int]) -> Along | None:
        """What the engine computes before each of `tokens` is chosen, as decoding computes it.

        None where an engine does not show its logits. The runner must be idle.
        """
        return None

    def drafts(self, contexts: Tensor, roots: Sequence[int]) -> Beams | None:
        """What the engine drafts after states [B, H] and the tokens that follow them, with the drafter's scores.

        None where it has no drafter, or does not show what it drafts. The runner must be idle.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of the engine's memory."""

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Run requests to the end and return results in their order."""
        if not requests:
            raise RequestError("the list of prompts is empty", remedy="pass at least one prompt")
        results: dict[str, Result] = {}
        ids = [self.submit(request) for request in requests]
        while len(results) < len(ids):
            for update in self.step():
                if update.result is not None and update.request_id in ids:  # others may be running too
                    results[update.request_id] = update.result
        return [results[i] for i in ids]

    def stream(self, request: Request) -> Iterator[Update]:
        """Updates of one request as they come; closing the iterator cancels it."""
        request_id = self.submit(request)
        finished = False
        try:
            while not finished:
                for update in self.step():
                    if update.request_id == request_id:
                        finished = update.result is not None
                        yield update
        finally:
            if not finished:
                self.cancel(request_id)


@dataclass(frozen=True)
class BuildOptions:
    """What `build` is asked for; every field is resolved (the recipe holds the defaults)."""

    checkpoint: Path
    output: Path
    backend: str
    tokenizer: Path | None
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    overwrite: bool
    tensorrt_llm: TensorRTOptions | None = None
    """Set for that backend only."""


class BuildPlan(Protocol):
    """What a build will read, write and derive; computed without touching the output."""

    @property
    def options(self) -> BuildOptions: ...

    def render(self) -> str: ...

    def as_dict(self) -> dict[str, Any]: ...


class Backend(Protocol):
    """Builds engines and loads them."""

    name: str

    def plan(self, options: BuildOptions) -> BuildPlan: ...

    def build(self, plan: BuildPlan, progress: Progress) -> Path: ...

    def load(
        self,
        engine: Path,
        *,
        device: str,
        verify_hashes: bool,
        draft_shape: DraftShape | None = None,
        api: str | None = None,
    ) -> Runner:
        """`draft_shape` overrides the engine's own where the backend can (a TensorRT engine has it baked in).

        `api` overrides the interface a TensorRT engine was built to be executed through.
        """
        ...
