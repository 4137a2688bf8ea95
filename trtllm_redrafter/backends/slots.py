"""What runners that own a fixed number of cache slots have in common: the queue, and how requests begin and end.

A request waits, gets a slot when its prompt is computed, and gives it back when it ends, is cancelled or fails.
"""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from trtllm_redrafter.backends.base import EngineInfo, Runner
from trtllm_redrafter.backends.requests import FinishReason, Request, Result, Update, limit_problems
from trtllm_redrafter.backends.running import RunningRequest
from trtllm_redrafter.backends.text import TextStream
from trtllm_redrafter.backends.tokenizer import EngineTokenizer
from trtllm_redrafter.errors import Problem, RequestError, not_finite, raise_together
from trtllm_redrafter.memory import memory_for
from trtllm_redrafter.redrafter.sampling import fresh_seed


@dataclass(eq=False)
class SlotRequest(RunningRequest):
    """A request and its slot."""

    seed: int
    slot: int = -1
    """-1 until it is admitted."""
    undrafted: bool = False
    """Run the next step without drafts: with them, the numbers of the last one were not finite."""


S = TypeVar("S", bound=SlotRequest)


class SlotRunner(Runner, Generic[S]):
    """A runner of `info.max_batch_size` slots, whose requests are `kind`s."""

    def __init__(
        self,
        info: EngineInfo,
        tokenizer: EngineTokenizer | None,
        eos_token_ids: frozenset[int],
        notes: tuple[str, ...],
        kind: type[S],
    ) -> None:
        self.info = info
        self.notes = notes
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._kind = kind
        self._waiting: deque[S] = deque()
        self._active: list[S] = []
        self._free = list(range(info.max_batch_size))
        self._numbers = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._active)

    def submit(self, request: Request) -> str:
        request_id = request.request_id or f"request-{next(self._numbers)}"
        raise_together(RequestError, self._problems(request, request_id), "the request cannot run", where=request_id)
        seed = fresh_seed() if request.sampling.seed is None else request.sampling.seed
        text = TextStream.of(self._tokenizer, request.sampling)
        result = Result(request_id, len(request.token_ids))
        self._waiting.append(self._kind(request, result, text, time.perf_counter(), seed))
        return request_id

    def cancel(self, request_id: str) -> Result | None:
        for sequence in (*self._waiting, *self._active):
            if sequence.result.request_id == request_id:
                self._finish(sequence, FinishReason.CANCELLED)
                return sequence.result
        return None

    @abstractmethod
    def _clear(self, sequence: S) -> None:
        """Keys and values of a request whose numbers were not finite must not reach the slot's next one."""

    @abstractmethod
    def _leave(self, sequence: S) -> None:
        """A request that had a slot has ended."""

    def _problems(self, request: Request, request_id: str) -> list[Problem]:
        """Everything that keeps a request from running, found before any work."""
        found = limit_problems(request, self.info, has_tokenizer=self._tokenizer is not None)
        if any(s.result.request_id == request_id for s in (*self._waiting, *self._active)):
            found.append(Problem(f"the id {request_id!r} is in use", remedy="give each request its own id"))
        return found

    def _step_memory(self, device: str) -> AbstractContextManager[None]:
        """Too little memory within the block is explained by the number of requests."""
        what = f"a step of {len(self._active) + len(self._waiting)} requests"
        remedy = "send fewer or shorter ones together, or build with a smaller --max-batch-size or --max-seq-len"
        return memory_for(what, why=device, remedy=remedy)

    def _emit(self, sequence: S, tokens: list[int], *, drafted: int | None = None) -> Update:
        """Hand out tokens until one ends the request; what a step accepted beyond that is dropped.

        `drafted`: how many of them the step could have accepted; None for the prompt's token, which is no step.
        """
        count, reason = sequence.add(tokens, self._eos)
        if drafted is not None:
            sequence.result.add_step(drafted=drafted, accepted=count - 1)
        if reason is not None:
            self._finish(sequence, reason)
        return sequence.update(tokens[:count])

    def _retry_or_fail(self, sequence: S, *, drafted: bool) -> Update:
        """A draft's NaN can reach its root through attention weights of zero: a drafted step is run again undrafted."""
        return Update(sequence.result.request_id, (), "") if drafted else self._fail(sequence)

    def _fail(self, sequence: S) -> Update:
        """End a request whose logits are not finite."""
        self._clear(sequence)
        written = len(sequence.result.token_ids)
        what = f"the logits after {written} tokens" if written else "the logits after the prompt"
        sequence.result.error = not_finite(what, self.info.dtype, where=sequence.result.request_id)
        self._finish(sequence, FinishReason.ERROR)
        return sequence.update()

    def _finish(self, sequence: S, reason: FinishReason) -> None:
        sequence.finish(reason)
        if sequence.slot < 0:
            self._waiting.remove(sequence)
            return
        self._active.remove(sequence)
        self._leave(sequence)
        self._free.append(sequence.slot)
