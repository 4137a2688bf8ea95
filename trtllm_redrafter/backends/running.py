"""A request that a runner has accepted and not finished: tokens in, updates out, by the same rules on all backends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from trtllm_redrafter.backends.requests import FinishReason, Request, Result, Update
from trtllm_redrafter.backends.text import TextStream


@dataclass
class RunningRequest:
    """A submitted request and its result so far. Backends add where it runs."""

    request: Request
    result: Result
    text: TextStream
    since: float
    """When it was submitted, by `time.perf_counter`."""

    @property
    def remaining(self) -> int:
        """Tokens that may still be written."""
        return self.request.sampling.max_tokens - len(self.result.token_ids)

    def add(self, tokens: Sequence[int], end_tokens: Collection[int]) -> tuple[int, FinishReason | None]:
        """Append tokens up to one that ends the request; returns how many, and why it ends, or None if it continues."""
        for count, token in enumerate(tokens, start=1):
            self.result.token_ids.append(token)
            if self._ends(token, end_tokens):
                return count, FinishReason.STOP
            if self.remaining <= 0:
                return count, FinishReason.LENGTH
        return len(tokens), None

    def _ends(self, token: int, end_tokens: Collection[int]) -> bool:
        """Add a token to the text; True when it, or a stop string it completes, ends the text.

        A stop token id adds no text. What ended the text is noted in the result.
        """
        sampling = self.request.sampling
        if token in sampling.stop_token_ids:
            self.result.stop_reason = token
            return True
        ends = token in end_tokens and not sampling.ignore_eos
        if self.text.push(token, ends=ends):
            self.result.stop_reason = self.text.stop_reason
            return True
        return ends

    def finish(self, reason: FinishReason) -> None:
        """No more tokens: the result is complete."""
        self.text.finish()
        self.result.text = self.text.text
        self.result.finish_reason = reason

    def update(self, tokens: Sequence[int] = ()) -> Update:
        """The update after `tokens` were added: the text that is final, and the result once it is complete."""
        final = self.result.finish_reason is not None
        piece = self.text.take(final=final)
        return Update(self.result.request_id, tuple(tokens), piece, self.result if final else None)
