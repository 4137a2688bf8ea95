"""Run requests on an engine's networks: admit, one pass a step, emit. Everything between two texts is on the device.

The bookkeeping follows the torch backend, so that texts and statistics are equal: a prompt is computed alone, a request
joins at a step's beginning and leaves at its end, and a step that drafts broke is done again without.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_redrafter.backends.base import EngineInfo, FinishReason, Request, Result, Runner, Update
from trtllm_redrafter.backends.requests import ignored_options, limit_problems
from trtllm_redrafter.backends.running import RunningRequest
from trtllm_redrafter.backends.tensorrt.decoder import Choices, Decoder, Report
from trtllm_redrafter.backends.text import TextStream
from trtllm_redrafter.backends.tokenizer import EngineTokenizer
from trtllm_redrafter.errors import Problem, RequestError, not_finite, raise_together
from trtllm_redrafter.memory import memory_for
from trtllm_redrafter.redrafter.sampling import fresh_seed, uniform

_SUPPORTED = (
    "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos", "stop_token_ids", "skip_special_tokens"
)  # fmt: skip
"""Options that the networks compute or the host applies. All others, new ones included, are refused."""


@dataclass(eq=False)
class _Sequence(RunningRequest):
    """A request and its slot, -1 until it is admitted."""

    seed: int
    slot: int = -1
    undrafted: bool = False
    """Do the next step without drafts: with them, the last one's numbers were not finite."""


class StepRunner(Runner):
    """`backend.TensorRTBackend.load` makes it."""

    def __init__(
        self,
        info: EngineInfo,
        decoder: Decoder,
        tokenizer: EngineTokenizer | None,
        eos_token_ids: frozenset[int],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.info = info
        self.notes = notes
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._waiting: deque[_Sequence] = deque()
        self._active: list[_Sequence] = []
        self._free = list(range(info.max_batch_size))
        self._numbers = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._active)

    def submit(self, request: Request) -> str:
        request_id = request.request_id or f"request-{next(self._numbers)}"
        problems = limit_problems(request, self.info, has_tokenizer=self._tokenizer is not None)
        problems += ignored_options(request.sampling, _SUPPORTED, "the engine's networks do not compute it")
        if any(s.result.request_id == request_id for s in (*self._waiting, *self._active)):
            problems.append(Problem(f"the id {request_id!r} is in use", remedy="give each request its own id"))
        raise_together(RequestError, problems, "the request cannot run", where=request_id)
        seed = fresh_seed() if request.sampling.seed is None else request.sampling.seed
        text = TextStream.of(self._tokenizer, request.sampling)
        result = Result(request_id, len(request.token_ids))
        self._waiting.append(_Sequence(request, result, text, time.perf_counter(), seed))
        return request_id

    def cancel(self, request_id: str) -> Result | None:
        for sequence in (*self._waiting, *self._active):
            if sequence.result.request_id == request_id:
                self._finish(sequence, FinishReason.CANCELLED)
                return sequence.result
        return None

    def step(self) -> list[Update]:
        what = f"a step of {len(self._active) + len(self._waiting)} requests"
        remedy = "send fewer or shorter ones together, or build with a smaller --max-batch-size or --max-seq-len"
        with memory_for(what, why=self._decoder.device, remedy=remedy):
            updates = []
            while self._waiting and self._free:
                updates.append(self._admit(self._waiting.popleft()))
            if self._active:
                updates.extend(self._decode())
            return updates

    def close(self) -> None:
        self._decoder.close()

    def _admit(self, sequence: _Sequence) -> Update:
        """Compute the prompt and emit the first token."""
        start = time.perf_counter()
        result = sequence.result
        self._free.sort()  # low slots first: a step runs all rows up to the last one in use
        choices = self._choices([sequence], [0], 1)
        report = self._decoder.prompt(self._free[0], sequence.request.token_ids, choices)
        sequence.slot = self._free.pop(0)  # a prompt that fails takes none with it
        result.queue_seconds = start - sequence.since
        if self.info.draft_shape is not None:
            result.accepted_per_position = [0] * self.info.draft_shape.draft_len
        self._active.append(sequence)
        result.prefill_seconds = time.perf_counter() - start
        return self._emit(sequence, report.tokens) if report.tokens else self._fail(sequence)

    def _decode(self) -> list[Update]:
        """One step of the whole batch."""
        start = time.perf_counter()
        batch = list(self._active)
        slots = [sequence.slot for sequence in batch]
        drafting = {sequence.slot for sequence in batch if self._drafts(sequence)}
        rows = range(1 + max(slots))
        reports = self._decoder.step(
            len(rows),
            [row in slots for row in rows],
            [row in drafting for row in rows] if drafting else None,
            self._choices(batch, slots, len(rows)),
        )
        elapsed = time.perf_counter() - start
        for sequence in batch:
            sequence.result.decode_seconds += elapsed
        return [self._take(a, reports[a.slot], drafted=a.slot in drafting) for a in batch]

    def _drafts(self, sequence: _Sequence) -> bool:
        """Not for who does not want it, has one token left to write, or must do without this time."""
        wanted = self.info.draft_shape is not None and sequence.request.draft
        return wanted and sequence.remaining > 1 and not sequence.undrafted

    def _take(self, sequence: _Sequence, report: Report, *, drafted: bool) -> Update:
        """Hand out what a step wrote, if its logits were finite."""
        shape = self.info.draft_shape
        if drafted and not report.drafts_finite and self.drafter_error is None:
            self.drafter_error = not_finite("the drafter's scores", self.info.dtype, where="drafter")
        used = drafted and report.drafts_finite
        if report.dirty:
            self._decoder.clean(sequence.slot)
        sequence.undrafted = not report.tokens
        if report.tokens:
            return self._emit(sequence, report.tokens, drafted=shape.draft_len if used and shape is not None else 0)
        if used:  # a draft's NaN can reach its root, through attention weights of zero
            return Update(sequence.result.request_id, (), "")
        return self._fail(sequence)

    def _emit(self, sequence: _Sequence, tokens: list[int], *, drafted: int | None = None) -> Update:
        """Hand out tokens until one ends the request; what a step accepted beyond that is dropped.

        `drafted`: how many of them the step could have accepted; None for the prompt's token, which is no step.
        """
        count, reason = sequence.add(tokens, self._eos)
        if drafted is not None:
            sequence.result.add_step(drafted=drafted, accepted=count - 1)
        if reason is not None:
            self._finish(sequence, reason)
        return sequence.update(tokens[:count])

    def _fail(self, sequence: _Sequence) -> Update:
        """End a request whose logits are not finite. Its keys and values must not reach the slot's next one."""
        self._decoder.forget(sequence.slot)
        written = len(sequence.result.token_ids)
        what = f"the logits after {written} tokens" if written else "the logits after the prompt"
        sequence.result.error = not_finite(what, self.info.dtype, where=sequence.result.request_id)
        self._finish(sequence, FinishReason.ERROR)
        return sequence.update()

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        sequence.finish(reason)
        if sequence.slot < 0:
            self._waiting.remove(sequence)
            return
        self._active.remove(sequence)
        self._decoder.release(sequence.slot)
        self._free.append(sequence.slot)

    def _choices(self, batch: Sequence[_Sequence], at: Sequence[int], rows: int) -> Choices | None:
        """How all `rows` choose their tokens, of which `batch` are `at` some; None: greedily."""
        if not any(sequence.request.sampling.temperature > 0.0 for sequence in batch):
            return None
        count = self._decoder.moved + 1
        temperature, top_k, top_p = (np.full(rows, value, np.float32) for value in (0.0, 0.0, 1.0))
        uniforms = np.zeros((rows, count), np.float32)
        for row, sequence in zip(at, batch, strict=True):
            sampling, written = sequence.request.sampling, len(sequence.result.token_ids)
            temperature[row], top_k[row], top_p[row] = sampling.temperature, sampling.top_k, sampling.top_p
            uniforms[row] = uniform(sequence.seed, np.arange(written, written + count)).numpy()
        return Choices(temperature, top_k, top_p, uniforms)
