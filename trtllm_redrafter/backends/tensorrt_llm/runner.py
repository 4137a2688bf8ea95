"""The tensorrt-llm backend's runner: requests in, updates out, over whichever client executes the engine.

TensorRT-LLM batches and schedules by itself, so `submit` hands a request over at once and `step` waits for what comes
back. What responses say of steps and acceptance is counted in `counting`.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass

from trtllm_redrafter.backends.base import EngineInfo, FinishReason, Request, Result, Runner, Update
from trtllm_redrafter.backends.running import RunningRequest
from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest, EngineClient, Event
from trtllm_redrafter.backends.tensorrt_llm.counting import StepCounter
from trtllm_redrafter.backends.tensorrt_llm.failures import DOCTOR, explained
from trtllm_redrafter.backends.tensorrt_llm.requests import client_request, request_problems
from trtllm_redrafter.backends.text import TextStream
from trtllm_redrafter.backends.tokenizer import EngineTokenizer
from trtllm_redrafter.errors import BackendError, Problem, RedrafterError, RequestError, raise_together

_STEP_SECONDS = 1.0
"""Longest wait of one `step()`, so that callers can cancel and stop."""

SILENCE_SECONDS = 600.0
"""Far longer than any step or prompt takes: by then some request must have received tokens."""

_FINISH = {"end_id": FinishReason.STOP, "stop_words": FinishReason.STOP, "cancelled": FinishReason.CANCELLED}


@dataclass
class _Active(RunningRequest):
    """A request that TensorRT-LLM is executing. `first`: when its first token came."""

    sent: ClientRequest
    counter: StepCounter
    first: float | None = None

    @property
    def number(self) -> int:
        return self.sent.number


class TensorRTRunner(Runner):
    """Made by `TensorRTLLMBackend.load`."""

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
        self._events: deque[Event] = deque()
        self._numbers = itertools.count()
        self._last_event = time.monotonic()

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
        sent = client_request(number, request, self.info, self._eos)
        try:
            self._client.submit(sent)
        except RedrafterError:
            raise
        except Exception as error:  # TensorRT-LLM refuses a request by whatever C++ raises; the engine goes on
            raise _refusal(RequestError, request_id, str(error)) from error
        result, shape = Result(request_id, len(request.token_ids)), self.info.draft_shape
        counter = StepCounter(result, None if shape is None else shape.draft_len)
        text = TextStream.of(self._tokenizer, request.sampling)
        self._last_event = time.monotonic() if not self._active else self._last_event
        self._active[number] = _Active(request, result, text, time.perf_counter(), sent, counter)
        return request_id

    def step(self) -> list[Update]:
        """The updates received; may be empty when none came within a second.

        A failed request raises. Updates of other requests that came before it are returned first, and those that came
        after it by the next call, so that one request's error costs the others no token.
        """
        if self._active and not self._events:
            self._events.extend(self._client.poll(_STEP_SECONDS))
            self._check_silence()
        updates: list[Update] = []
        while self._events:
            active = self._active.get(self._events[0].number)
            if active is not None and self._events[0].error is not None and updates:
                break
            event = self._events.popleft()
            if active is not None:
                updates.append(self._apply(active, event))
        return updates

    def cancel(self, request_id: str) -> Result | None:
        for active in self._active.values():
            if active.result.request_id == request_id:
                self._client.cancel(active.number)
                self._finish(active, FinishReason.CANCELLED)
                return active.result
        return None

    def close(self) -> None:
        self._client.close()

    def _check_silence(self) -> None:
        """Ranks that wait for each other, or for one that was killed, stay silent: without a limit, so would this."""
        now = time.monotonic()
        if self._events:
            self._last_event = now
        elif now - self._last_event > SILENCE_SECONDS:
            what = f"the engine has not answered for {SILENCE_SECONDS:.0f} seconds"
            why = f"{len(self._active)} request(s) are running; a rank may have been killed, or wait for another one"
            remedy = f"load it again; {DOCTOR}, and see with `nvidia-smi` what its processes do"
            raise BackendError(what, where=self.info.path, why=why, remedy=remedy)

    def _apply(self, active: _Active, event: Event) -> Update:
        if event.error is not None:
            del self._active[event.number]
            raise _refusal(BackendError, active.result.request_id, event.error)
        now, tokens = time.perf_counter(), _with_end(active.sent, event)
        if active.first is None and tokens:
            active.first, active.result.prefill_seconds = now, now - active.since
        taken, reason = active.add(tokens, self._eos)
        active.counter.add(event, emitted=len(tokens), taken=taken)
        if reason is not None and not event.final:
            self._client.cancel(active.number)  # a stop string, which the executor was not told
        elif reason is None and event.final:
            reason = _FINISH.get(event.finish or "length", FinishReason.LENGTH)
        if active.first is not None:
            active.result.decode_seconds = now - active.first
        if reason is not None:
            self._finish(active, reason)
        return active.update(tokens[:taken])

    def _finish(self, active: _Active, reason: FinishReason) -> None:
        active.finish(reason)
        active.counter.settle()
        del self._active[active.number]


def _with_end(sent: ClientRequest, event: Event) -> tuple[int, ...]:
    """The event's tokens and the end token. ReDrafter's decoder cuts that one off and keeps stop words; others keep it.

    With it in both cases, texts, token ids and statistics do not depend on the decoder.
    """
    end = sent.end_id
    if event.finish == "end_id" and end is not None and end not in event.token_ids:
        return (*event.token_ids, end)
    return event.token_ids


def _refusal(kind: type[RedrafterError], request_id: str, message: str) -> RedrafterError:
    remedy = "see the message; `trtllm-redrafter doctor` checks the machine"
    return explained("TensorRT-LLM refused the request", message, remedy, where=request_id, kind=kind)
