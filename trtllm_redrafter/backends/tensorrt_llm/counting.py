"""Count the steps and the acceptance of one request from its responses.

A response is one decoding step; the first one is the prefill. As TensorRT-LLM counts, a step drafts `draft_len` tokens:
the positions it can accept, however many beams propose them.

Responses may be merged on the way. `decoding_iter` shows it: the iterations since the first response are the steps, and
where they differ from the number of responses, the totals follow them and there are no figures by position. Where a
release does not report iterations, a response longer than a step can be gives it away; then no figures are given.

    counter = StepCounter(result, draft_len=4)
    counter.add(event, emitted=3, taken=3)      # one response with three tokens
    counter.settle()                            # result.steps, accepted_tokens, ... are final
"""

from __future__ import annotations

from typing import Any

from trtllm_redrafter.backends.base import Result
from trtllm_redrafter.backends.tensorrt_llm.client import Event


class StepCounter:
    """Writes the counts into `result`. `draft_len` None: an engine without a drafter."""

    def __init__(self, result: Result, draft_len: int | None) -> None:
        self._result = result
        self._draft_len = draft_len or 0
        self._responses = 0
        self._emitted = 0  # tokens the engine wrote, including those after a stop string
        self._prefill_iterations = 1
        self._iterations: int | None = None
        self._drafted: int | None = None
        self._merged = False
        result.accepted_per_position = [0] * self._draft_len

    def add(self, event: Event, *, emitted: int, taken: int) -> None:
        """One response: `emitted` tokens, of which `taken` belong to the text."""
        self._iterations = event.decoding_iter or self._iterations
        self._drafted = event.drafted_tokens if event.drafted_tokens is not None else self._drafted
        if not emitted:
            return
        self._responses += 1
        self._emitted += emitted
        if self._responses == 1:
            self._merged = emitted > 1
            if not self._merged and event.decoding_iter is not None:
                self._prefill_iterations = event.decoding_iter
            return
        self._merged = self._merged or emitted > self._draft_len + 1
        self._result.add_step(drafted=self._draft_len, accepted=taken - 1)

    def settle(self) -> None:
        """After the last response: correct the counts if responses were not one step each."""
        if self._iterations is None:
            if self._merged:
                self._replace(0, 0, 0)
            return
        steps = max(0, self._iterations - self._prefill_iterations)
        if steps != self._result.steps or self._merged:
            drafted = steps * self._draft_len if self._drafted is None else self._drafted
            self._replace(steps, max(0, self._emitted - 1 - steps), drafted)

    def _replace(self, steps: int, accepted: int, drafted: int) -> None:
        """Totals without positions, which are not known."""
        self._result.steps, self._result.accepted_tokens = steps, accepted
        self._result.drafted_tokens = drafted if steps else 0
        self._result.accepted_per_position = []


def drafted_tokens(holder: Any) -> int | None:
    """Drafted tokens as the release counts them; not every release does."""
    metrics = getattr(holder, "request_perf_metrics", None)
    counts = getattr(metrics, "speculative_decoding", None)
    return int(getattr(counts, "total_draft_tokens", None) or 0) or None
