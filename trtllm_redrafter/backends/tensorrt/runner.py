"""Run requests on an engine's networks: admit, one pass a step, emit. Everything between two texts is on the device.

The bookkeeping follows the torch backend, so that texts and statistics are equal: a prompt is computed alone, a request
joins at a step's beginning and leaves at its end, and a step that drafts broke is done again without.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from trtllm_redrafter.backends.base import EngineInfo, Request, Update
from trtllm_redrafter.backends.requests import ignored_options
from trtllm_redrafter.backends.slots import SlotRequest, SlotRunner
from trtllm_redrafter.backends.tensorrt.decoder import Choices, Decoder, Report
from trtllm_redrafter.backends.tokenizer import EngineTokenizer
from trtllm_redrafter.errors import Problem, not_finite
from trtllm_redrafter.redrafter.sampling import uniform

_SUPPORTED = (
    "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos", "stop_token_ids", "skip_special_tokens"
)  # fmt: skip
"""Options that the networks compute or the host applies. All others, new ones included, are refused."""


class StepRunner(SlotRunner[SlotRequest]):
    """`backend.TensorRTBackend.load` makes it."""

    def __init__(
        self,
        info: EngineInfo,
        decoder: Decoder,
        tokenizer: EngineTokenizer | None,
        eos_token_ids: frozenset[int],
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(info, tokenizer, eos_token_ids, notes, SlotRequest)
        self._decoder = decoder

    def step(self) -> list[Update]:
        with self._step_memory(self._decoder.device):
            updates = []
            while self._waiting and self._free:
                updates.append(self._admit(self._waiting.popleft()))
            if self._active:
                updates.extend(self._decode())
            return updates

    def close(self) -> None:
        self._decoder.close()

    def _clear(self, sequence: SlotRequest) -> None:
        self._decoder.forget(sequence.slot)

    def _leave(self, sequence: SlotRequest) -> None:
        self._decoder.release(sequence.slot)

    def _problems(self, request: Request, request_id: str) -> list[Problem]:
        ignored = ignored_options(request.sampling, _SUPPORTED, "the engine's networks do not compute it")
        return super()._problems(request, request_id) + ignored

    def _admit(self, sequence: SlotRequest) -> Update:
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

    def _drafts(self, sequence: SlotRequest) -> bool:
        """Not for who does not want it, has one token left to write, or must do without this time."""
        wanted = self.info.draft_shape is not None and sequence.request.draft
        return wanted and sequence.remaining > 1 and not sequence.undrafted

    def _take(self, sequence: SlotRequest, report: Report, *, drafted: bool) -> Update:
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
        return self._retry_or_fail(sequence, drafted=used)

    def _choices(self, batch: Sequence[SlotRequest], at: Sequence[int], rows: int) -> Choices | None:
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
