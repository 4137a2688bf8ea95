"""What every backend offers: build an engine from a checkpoint, run requests on it.

The checkpoint, request and result types are the same for both backends, so that moving from a laptop to a GPU
host changes one word. The core of a runner is `submit()` and `step()`: a request joins and leaves the running
batch between steps. `generate()` and `stream()`, written once in `Runner`, are loops around them, and the
HTTP server drives the same two calls.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_redrafter.errors import NumericalError, Problem, RedrafterError, RequestError, raise_together
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.prompts.messages import Prompt, brief, normalise
from trtllm_redrafter.redrafter.config import DraftShape

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_redrafter.backends.tensorrt_llm.options import TensorRTOptions
    from trtllm_redrafter.backends.tokenizer import EngineTokenizer
    from trtllm_redrafter.redrafter.beam_search import Beams


MAX_TEMPERATURE = 1e38
"""Far beyond what flattens any distribution; float32 ends soon after."""


class FinishReason(str, enum.Enum):
    """Why a request ended; the values are the OpenAI API's, plus `cancelled` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch the filters off.

    The order is temperature, then top-k, then top-p on what is left, as in transformers and vLLM. `seed`
    fixes one uniform number per output position, so that the same seed gives the same text with and without
    drafting. `stop` strings end the text before their first occurrence, wherever token borders fall, and may have
    special tokens in them; `stop_token_ids` end it like end tokens, `ignore_eos` or not. `skip_special_tokens` False
    leaves special tokens in the text.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def problems(self) -> list[Problem]:
        """Everything that is of a wrong type or out of range, for one message."""
        found = []

        def check(name: str, types: tuple[type, ...], remedy: str, allowed: Callable[[Any], bool]) -> None:
            value = getattr(self, name)
            good = isinstance(value, types) and not isinstance(value, bool)
            if not good or not allowed(value):
                found.append(Problem(f"{name} is {brief(value)}", remedy=remedy))

        whole, real = (int,), (int, float)
        check("max_tokens", whole, "ask for at least one token", lambda v: v >= 1)
        check("temperature", real, "use 0 for greedy, or a positive number", lambda v: 0.0 <= v <= MAX_TEMPERATURE)
        check("top_k", whole, "use 0 to switch it off, or a number below 2**31", lambda v: 0 <= v < 2**31)
        check("top_p", real, "use a number above 0 and up to 1", lambda v: 0.0 < v <= 1.0)
        if self.seed is not None:
            check("seed", whole, "use 0 <= seed < 2**63", lambda v: 0 <= v < 2**63)
        if any(not isinstance(s, str) or not s for s in self.stop):
            found.append(Problem("a stop string is empty", remedy="leave it out"))
        if any(type(token) is not int or token < 0 for token in self.stop_token_ids):
            ids = brief(self.stop_token_ids)
            found.append(Problem(f"stop_token_ids are {ids}", remedy="give token ids, whole numbers from 0"))
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
    least j + 1 drafts were accepted. `drafted_tokens` counts the positions that a step could accept (the draft
    length, however many beams propose them), on every backend, so `acceptance_rate` is a share of them. Times are
    seconds; the time of a step that served several requests is
    given to each of them.
    """

    request_id: str
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the text; None: an end token of the model, or no stop at all."""
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    error: RedrafterError | None = None
    """Why the request ended early (`FinishReason.ERROR`); tokens and text are those from before."""

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
    notes: tuple[str, ...] = ()
    """What a user should know of how the engine runs on this machine."""
    drafter_error: NumericalError | None = None
    """Set once a step went undrafted because the drafter's numbers were not finite; texts are right all the same."""
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

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, through the chat template as `prompt.chat` says; None: if there is one."""
        if self._tokenizer is None:
            raise RequestError(
                "the engine has no tokenizer",
                where=self.info.path,
                remedy="build it with --tokenizer DIR, or submit token ids",
            )
        return self._tokenizer.encode_prompt(prompt)

    def encode_prompt(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        chat: bool,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a prompt: plain text, or with `chat` through the chat template.

        Under `chat` a string is one user turn, a sequence is the conversation's messages (`role`, `content`).
        `template_kwargs` are further variables of the template, such as `enable_thinking`.
        """
        content = prompt if isinstance(prompt, str) else normalise(prompt)
        return self.encode(Prompt(content, chat=chat, template_kwargs=template_kwargs or {}))

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
        """Run requests to the end and return results in their order.

        A request that is refused keeps all from running: the error names every refused one. A request that fails on the
        way does not end the others; the first such error is raised when all are done, with everybody's results in its
        `results`. Nothing stays queued when this raises, whatever it raises.
        """
        if not requests:
            raise RequestError("the list of prompts is empty", remedy="pass at least one prompt")
        results: dict[str, Result] = {}
        ids: list[str] = []
        try:
            self._submit_all(requests, ids)
            while len(results) < len(ids):
                for update in self.step():
                    if update.result is not None and update.request_id in ids:  # others may be running too
                        results[update.request_id] = update.result
        finally:
            for request_id in ids:
                if request_id not in results:
                    self.cancel(request_id)
        ordered = [results[i] for i in ids]
        error = next((result.error for result in ordered if result.error is not None), None)
        if error is not None:
            error.results = tuple(ordered)
            raise error
        return ordered

    def _submit_all(self, requests: Sequence[Request], ids: list[str]) -> None:
        """Queue requests, adding to `ids`; `RequestError` with every one that is refused."""
        refused: list[Problem] = []
        for number, request in enumerate(requests, start=1):
            try:
                ids.append(self.submit(request))
            except RequestError as error:
                if len(requests) == 1:
                    raise
                problems = error.problems or (error.problem,)
                refused += [Problem(p.what, f"prompt {number}", p.why, p.remedy) for p in problems]
        what = f"{len(requests) - len(ids)} of {len(requests)} prompts are refused; none was run"
        raise_together(RequestError, refused, what)

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
                        if update.result is not None and update.result.error is not None:
                            raise update.result.error
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

    def build(
        self, plan: BuildPlan, progress: Progress, *, on_complete: Callable[[Path], None] | None = None
    ) -> Path: ...

    def load(
        self,
        engine: Path,
        *,
        device: str,
        verify_hashes: bool,
        draft_shape: DraftShape | None = None,
        api: str | None = None,
        kv_cache_tokens: int | None = None,
    ) -> Runner:
        """`draft_shape` overrides the engine's own where the backend can (a TensorRT engine has it baked in).

        `api` overrides the interface a TensorRT engine was built to be executed through. `kv_cache_tokens` is the
        number of tokens that all running requests hold at most: a TensorRT engine, which would otherwise take its
        share of the whole GPU, then leaves the rest to a second one. (A torch engine's cache has the size it was built
        with.)
        """
        ...
