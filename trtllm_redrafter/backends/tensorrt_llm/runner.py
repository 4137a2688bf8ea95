"""The tensorrt-llm backend's runner: requests in, updates out, over whichever client executes the engine.

TensorRT-LLM batches and schedules by itself, so `submit` hands a request over at once and `step` waits for what comes
back. A response is one decoding step of one request; its statistics follow TensorRT-LLM's own counting: a step drafts
`draft_len` tokens (the length of the path that can be accepted), where the torch backend counts the nodes of its tree.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from trtllm_redrafter.backends.base import EngineInfo, FinishReason, Request, Result, Runner, Update
from trtllm_redrafter.backends.tensorrt_llm.client import EngineClient, Event
from trtllm_redrafter.backends.tensorrt_llm.failures import explain
from trtllm_redrafter.backends.tensorrt_llm.requests import client_request, request_problems
from trtllm_redrafter.backends.text import TextStream
from trtllm_redrafter.backends.tokenizer import EngineTokenizer
from trtllm_redrafter.errors import BackendError, Problem, RequestError, raise_together

_STEP_SECONDS = 1.0
"""Longest wait of one `step()`, so that callers can cancel and stop."""

_FINISH = {"end_id": FinishReason.STOP, "stop_words": FinishReason.STOP, "cancelled": FinishReason.CANCELLED}


@dataclass
class _Active:
    """A request at the executor."""

    request: Request
    number: int
    result: Result
    text: TextStream
    since: float
    first: float | None = None
    responses: int = 0


class TensorRTRunner(Runner):
    """Made by `loading.load_runner`."""

    def __init__(
        self,
        info: EngineInfo,
        client: EngineClient,
        tokenizer: EngineTokenizer | None,
        eos_token_ids: frozenset[int],
        *,
        greedy: bool,
    ) -> None:
        self.info = info
        self._client = client
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._greedy = greedy
        self._active: dict[int, _Active] = {}
        self._numbers = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self._active)

    def submit(self, request: Request) -> str:
        number = next(self._numbers)
        request_id = request.request_id or f"request-{number}"
        has_tokenizer = self._tokenizer is not None
        problems = request_problems(request, self.info, greedy=self._greedy, has_tokenizer=has_tokenizer)
        if any(a.result.request_id == request_id for a in self._active.values()):
            problems.append(Problem(f"the id {request_id!r} is in use", remedy="give each request its own id"))
        raise_together(RequestError, problems, "the request cannot run", where=request_id)
        result = Result(request_id, len(request.token_ids))
        if self.info.draft_shape is not None:
            result.accepted_at = [0] * self.info.draft_shape.draft_len
        text = TextStream(self._tokenizer, request.sampling.stop)
        self._client.submit(client_request(number, request, self.info, self._eos))
        self._active[number] = _Active(request, number, result, text, time.perf_counter())
        return request_id

    def step(self) -> list[Update]:
        """What has come back; may be empty when nothing did within a second."""
        events = self._client.poll(_STEP_SECONDS) if self._active else []
        return [self._apply(self._active[event.number], event) for event in events if event.number in self._active]

    def cancel(self, request_id: str) -> Result | None:
        for active in self._active.values():
            if active.result.request_id == request_id:
                self._client.cancel(active.number)
                self._finish(active, FinishReason.CANCELLED)
                return active.result
        return None

    def close(self) -> None:
        self._client.close()

    def _apply(self, active: _Active, event: Event) -> Update:
        if event.error is not None:
            del self._active[event.number]
            raise _request_error(active, event.error)
        now = time.perf_counter()
        if active.first is None and event.token_ids:
            active.first, active.result.prefill_seconds = now, now - active.since
        active.responses += bool(event.token_ids)
        taken, reason = self._take(active, event.token_ids)
        self._count(active, event, taken)
        if reason is not None and not event.final:
            self._client.cancel(active.number)  # a stop string: the executor does not know of it
        elif reason is None and event.final:
            reason = _FINISH.get(event.finish or "length", FinishReason.LENGTH)
        if active.first is not None:
            active.result.decode_seconds = now - active.first
        if reason is not None:
            self._finish(active, reason)
        piece = active.text.take(final=reason is not None)
        tokens = tuple(event.token_ids[:taken])
        return Update(active.result.request_id, tokens, piece, active.result if reason is not None else None)

    def _take(self, active: _Active, tokens: tuple[int, ...]) -> tuple[int, FinishReason | None]:
        """Append tokens up to one that ends the request; how many were taken."""
        result, sampling = active.result, active.request.sampling
        for count, token in enumerate(tokens, start=1):
            result.token_ids.append(token)
            if active.text.push(token):
                result.stop_reason = active.text.stop_reason
                return count, FinishReason.STOP
            if token in self._eos and not sampling.ignore_eos:
                return count, FinishReason.STOP
            if len(result.token_ids) >= sampling.max_tokens:
                return count, FinishReason.LENGTH
        return len(tokens), None

    def _count(self, active: _Active, event: Event, taken: int) -> None:
        """Steps and acceptance. The first response is the prefill's token."""
        result, shape = active.result, self.info.draft_shape
        if taken and active.responses > 1:
            result.steps += 1
            result.accepted_tokens += taken - 1
            for depth in range(min(taken - 1, len(result.accepted_at))):
                result.accepted_at[depth] += 1
        if shape is not None:
            result.drafted_tokens = result.steps * shape.draft_len
        iterations = event.decoding_iter
        if event.final and iterations is not None and iterations != active.responses:
            self._recount(result, iterations, event)

    def _recount(self, result: Result, iterations: int, event: Event) -> None:
        """Responses were merged on the way: totals by TensorRT-LLM's own counters, nothing by position."""
        result.steps = max(0, iterations - 1)
        result.accepted_at = []
        if result.steps:
            shape = self.info.draft_shape
            own = 0 if shape is None else result.steps * shape.draft_len
            result.drafted_tokens = event.drafted if event.drafted is not None else own
            counted = max(0, len(result.token_ids) - 1 - result.steps)
            result.accepted_tokens = event.accepted if event.accepted is not None else counted

    def _finish(self, active: _Active, reason: FinishReason) -> None:
        active.text.finish()
        active.result.text = active.text.text
        active.result.finish_reason = reason
        del self._active[active.number]


def _request_error(active: _Active, message: str) -> BackendError:
    known = explain(message)
    return BackendError(
        "TensorRT-LLM refused the request" if known is None else known.what,
        where=active.result.request_id,
        why=message[:500],
        remedy="see the message; `trtllm-redrafter doctor` checks the machine" if known is None else known.remedy,
    )
