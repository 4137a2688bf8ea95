"""Run requests on an engine's networks: the torch backend's bookkeeping around passes that do everything themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

import numpy as np

from trtllm_redrafter.backends.base import Along, EngineInfo, Update
from trtllm_redrafter.backends.tensorrt.decoder import Choices, Decoder, Report
from trtllm_redrafter.backends.tokenizer import EngineTokenizer
from trtllm_redrafter.backends.torch.runner import TorchRunner, _Sequence
from trtllm_redrafter.errors import not_finite
from trtllm_redrafter.redrafter.sampling import uniform

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_redrafter.backends.torch.executor import ModelExecutor
    from trtllm_redrafter.redrafter.beam_search import Beams


class _Device:
    """What the torch backend's bookkeeping wants of an executor."""

    def __init__(self, decoder: Decoder) -> None:
        self.device, self.clear, self.close = decoder.device, decoder.clear, decoder.close

    def threads(self) -> AbstractContextManager[None]:
        return nullcontext()


class StepRunner(TorchRunner):
    """Queue, stop conditions, texts and statistics are the torch backend's; a step is one pass of a `Decoder`."""

    def __init__(
        self,
        info: EngineInfo,
        decoder: Decoder,
        tokenizer: EngineTokenizer | None,
        eos_token_ids: frozenset[int],
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(info, cast("ModelExecutor", _Device(decoder)), None, tokenizer, eos_token_ids, notes)
        self._decoder = decoder

    def autoregressive(self) -> StepRunner:
        return self

    def along(self, prompt: Sequence[int], tokens: Sequence[int]) -> Along | None:
        return None

    def drafts(self, contexts: Tensor, roots: Sequence[int]) -> Beams | None:
        return None

    def close(self) -> None:
        self._decoder.close()

    def _admit(self, sequence: _Sequence) -> Update:
        """Compute the prompt and emit the first token."""
        start = time.perf_counter()
        request, result = sequence.request, sequence.result
        self._free.sort()  # low slots first: a step runs all rows up to the last
        report = self._decoder.prompt(self._free[0], request.token_ids, self._choices([sequence], 1, at=[0]))
        sequence.slot = self._free.pop(0)  # a prompt that fails takes none with it
        sequence.base = len(request.token_ids)
        result.queue_seconds = start - sequence.since
        if self.info.draft_shape is not None:
            result.accepted_at = [0] * self.info.draft_shape.draft_len
        self._active.append(sequence)
        result.prefill_seconds = time.perf_counter() - start
        if not report.tokens:
            return self._fail(sequence)
        sequence.root = report.tokens[0]
        return self._emit(sequence, report.tokens)

    def _decode(self) -> list[Update]:
        """One step of the whole batch."""
        start = time.perf_counter()
        batch = list(self._active)
        drafting = [self._drafts(sequence) for sequence in batch]
        rows = 1 + max(sequence.slot for sequence in batch)
        active, drafted = [False] * rows, [False] * rows
        for sequence, drafts in zip(batch, drafting, strict=True):
            active[sequence.slot], drafted[sequence.slot] = True, drafts
        choices = self._choices(batch, rows, at=[sequence.slot for sequence in batch])
        reports = self._decoder.step(rows, active, drafted if any(drafting) else None, choices)
        own = [reports[sequence.slot] for sequence in batch]
        for sequence, report, drafts in zip(batch, own, drafting, strict=True):
            self._take(sequence, report, drafted=drafts)
        elapsed = time.perf_counter() - start
        for sequence in batch:
            sequence.result.decode_seconds += elapsed
        return [
            self._emit(sequence, report.tokens)
            if report.tokens
            else self._retry_or_fail(sequence, drafted=drafts and report.drafts_finite)
            for sequence, report, drafts in zip(batch, own, drafting, strict=True)
        ]

    def _drafts(self, sequence: _Sequence) -> bool:
        """As in the torch backend: not for who does not want it, has one token left, or must do without."""
        wanted = self.info.draft_shape is not None and sequence.request.draft
        return wanted and sequence.remaining > 1 and not sequence.undrafted

    def _take(self, sequence: _Sequence, report: Report, *, drafted: bool) -> None:
        """Note what a step committed."""
        sequence.undrafted = not report.tokens
        if report.tokens:
            sequence.base += len(report.tokens)
            sequence.root = report.tokens[-1]
            sequence.result.steps += 1
        if drafted and not report.drafts_finite and self.drafter_error is None:
            self.drafter_error = not_finite("the drafter's scores", self.info.dtype, where="drafter")
        if drafted and report.drafts_finite and report.tokens and self.info.draft_shape is not None:
            sequence.result.drafted_tokens += self.info.draft_shape.draft_len
        if report.dirty:
            self._decoder.clean(sequence.slot)

    def _choices(self, batch: Sequence[_Sequence], rows: int, *, at: Sequence[int]) -> Choices | None:
        """How the rows of `batch`, which are `at` some of all `rows`, choose their tokens; None: all greedily."""
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
