"""What every backend offers: build an engine from a checkpoint, run requests on it.

The checkpoint, request and result types are the same for both backends, so that moving from a laptop to a GPU
host changes one setting. The core of a runner is `submit()` and `step()`: a request joins and leaves the running
batch between steps. `generate()` and `stream()`, written once in `Runner`, are loops around them; a server would
drive the same two calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_redrafter.backends.requests import (
    EngineInfo,
    FinishReason,
    Request,
    Result,
    Update,
    acceptance_length,
)
from trtllm_redrafter.errors import NumericalError, Problem, RequestError, raise_together
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.prompts.messages import Prompt, normalise
from trtllm_redrafter.prompts.sampling import SamplingParams
from trtllm_redrafter.redrafter.config import DraftShape

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_redrafter.backends.engine_config import EngineConfig
    from trtllm_redrafter.backends.tensorrt.compilers import CompilerOptions
    from trtllm_redrafter.backends.tensorrt_llm.options import TensorRTLLMOptions
    from trtllm_redrafter.backends.tokenizer import EngineTokenizer
    from trtllm_redrafter.redrafter.beam_search import Beams

__all__ = [
    "Backend", "BuildOptions", "BuildPlan", "EngineInfo", "FinishReason", "Request", "Result", "Runner",
    "SamplingParams", "TeacherForced", "Update", "acceptance_length",
]  # fmt: skip
"""Requests and results are defined in `requests`, options of decoding in `prompts.sampling`."""


@dataclass(frozen=True)
class TeacherForced:
    """What an engine computes along a given text of n tokens: row i is what token i is chosen from."""

    logits: Tensor  # [n, V] float32
    states: Tensor | None
    """[n, H] in the engine's dtype, what its drafter reads; None where it does not show them."""


class Runner(ABC):
    """An engine ready to run. Not thread-safe: one thread drives `step()`."""

    info: EngineInfo
    notes: tuple[str, ...] = ()
    """What a user should know about how the engine runs on this machine."""
    row_invariant: bool = False
    """Are the bits of a token's logits independent of what else is in the batch? Then greedy texts are, too."""
    prepares_shapes: bool = False
    """Does a prompt or a batch of a new shape take longer the first time, since kernels are compiled and captured?"""
    drafter_error: NumericalError | None = None
    """Set once a step has run without drafts because the drafter's numbers were not finite. Texts are unaffected."""
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
        """Drop a request between steps; returns its partial result, or None if there is no such request (any more)."""

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Is anything queued or running?"""

    @property
    def has_chat_template(self) -> bool:
        """Can prompts be rendered as chat turns?"""
        return self._tokenizer is not None and self._tokenizer.has_chat_template

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. `prompt.chat` says whether the chat template is used; None: if there is one."""
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
        """The runner to compare drafting with: this one, or one of the same weights that is faster without drafting.

        Another one has to be closed as well.
        """
        return self

    def teacher_forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> TeacherForced | None:
        """Logits and states before each of `tokens`, which follow `prompt`, computed as in decoding.

        None if the engine does not expose its logits. The runner must be idle.
        """
        return None

    def drafts(self, contexts: Tensor, roots: Sequence[int]) -> Beams | None:
        """What the engine drafts after states [B, H] and the tokens that follow them, with the drafter's scores.

        None if it has no drafter, or does not expose what it drafts. The runner must be idle.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Release the engine's memory."""

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Run requests to the end and return results in their order.

        If any request is refused, none is run, and the error names every refused one. A request that fails later does
        not end the others; the first such error is raised when all are done, with the results of all in its `results`.
        Whatever is raised, nothing stays queued.
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
    """Options of a build, all resolved (the recipe has the defaults)."""

    checkpoint: Path
    output: Path
    backend: str
    tokenizer: Path | None
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    overwrite: bool
    tensorrt_llm: TensorRTLLMOptions | None = None
    """Set for that backend only."""
    tensorrt: CompilerOptions | None = None
    """The same."""


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
        engine: Path | EngineConfig,
        *,
        device: str,
        verify_hashes: bool,
        draft_shape: DraftShape | None = None,
        api: str | None = None,
        kv_cache_tokens: int | None = None,
    ) -> Runner:
        """`draft_shape` overrides the engine's own where the backend can (a TensorRT engine has it baked in).

        `api` overrides the interface a TensorRT engine was built to be executed through. `kv_cache_tokens` is the
        largest number of tokens that all running requests hold: a TensorRT engine, which would otherwise take its
        share of the whole GPU, then leaves the rest to a second one. (A torch engine's cache has the size it was built
        with.)
        """
        ...
