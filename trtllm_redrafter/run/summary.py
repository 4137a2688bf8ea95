"""Figures over a batch of finished jobs: how fast, and how much of what was drafted came through."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from trtllm_redrafter.backends.requests import SpecDecodingStats
from trtllm_redrafter.run.jobs import Job


@dataclass
class RunSummary(SpecDecodingStats):
    """Figures over all finished jobs. `decode_tokens_per_second` is one request's own speed, averaged by time."""

    wall_seconds: float = 0.0
    prompts: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0
    exit_code: int = 0
    """0 while every prompt has a result, else that of the first failure."""
    _start: float = field(default_factory=time.perf_counter, repr=False)

    def add_job(self, job: Job) -> None:
        self.prompts += 1
        self.wall_seconds = time.perf_counter() - self._start
        if job.error is not None:
            self.failed += 1
            self.exit_code = self.exit_code or job.error.exit_code
            return
        assert job.result is not None
        result = job.result
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += len(result.token_ids)
        self.decoded_tokens += max(0, len(result.token_ids) - 1)
        self.add(result)
        self.prefill_seconds += result.prefill_seconds
        self.decode_seconds += result.decode_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """All tokens over all time, prompts included: what a user with this batch waits for."""
        return self.completion_tokens / self.wall_seconds if self.wall_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "failed": self.failed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "steps": self.steps,
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_rate_per_position": self.acceptance_rate_per_position,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "wall_seconds": self.wall_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }
