"""Request and report of the parity gate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.engine_config import EngineConfig, read_engine_config
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.verify.distributions import DistributionCheck
from trtllm_redrafter.verify.gate_drafter import DraftCheck
from trtllm_redrafter.verify.steps import AcceptanceCheck
from trtllm_redrafter.verify.token_checks import TokenCheck

PROMPTS = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a short story about a lighthouse keeper who finds a map.",
    "List the first ten prime numbers and explain what makes them prime.",
    "Translate into French: The train leaves at nine, but the station opens at seven.",
)
"""Default prompts: prose, a story, a list, a translation."""


@dataclass(frozen=True)
class GateRequest:
    """What to compare. `prompts` are texts; `min_acceptance` is a floor in tokens per step, or None."""

    engine: Path
    reference: Path
    prompts: tuple[str, ...]
    max_tokens: int
    min_acceptance: float | None
    device: str

    @cached_property
    def config(self) -> EngineConfig:
        """The engine's config, read once. `InputError` if `engine` is not an engine."""
        return read_engine_config(self.engine)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The reference, opened once."""
        return Checkpoint.open(self.reference)


@dataclass(frozen=True)
class GateReport:
    """`alarms` are problems that no single token shows. `sampled`: tokens were drawn, so single ones are not checked.

    `distributions`, `drafts`, `weights`: None where the engine does not return them; `not_seen` then says so.
    """

    request: GateRequest
    tokens: TokenCheck
    alarms: tuple[Problem, ...]
    steps: AcceptanceCheck | None
    """None: the engine has no drafter."""
    distributions: DistributionCheck | None
    drafts: DraftCheck | None
    weights: int | None
    """Tensors compared bit for bit."""
    not_seen: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    sampled: bool

    @property
    def same(self) -> int:
        return self.tokens.same

    @property
    def ties(self) -> int:
        return self.tokens.ties

    @property
    def faults(self) -> tuple[Problem, ...]:
        return self.tokens.faults

    @property
    def ok(self) -> bool:
        return not self.faults and not self.alarms

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per step, by the engine's own count."""
        return None if self.steps is None else self.steps.found.acceptance_length

    @property
    def reference_acceptance_length(self) -> float | None:
        """Tokens per step of the checkpoint's drafter on the same texts."""
        return None if self.steps is None else self.steps.expected.acceptance_length

    def render(self) -> str:
        lines = [f"{self.request.engine} {'passes' if self.ok else 'FAILS'} against {self.request.reference}"]
        if self.weights is not None:
            lines.append(f"  weights     {self.weights} tensors compared bit for bit")
        lines.append(f"  tokens      {self._tokens()}")
        lines += [part.render() for part in (self.distributions, self.drafts, self.steps) if part is not None]
        lines += [f"  not seen    {text}" for text in self.not_seen]
        problems = (*self.faults, *self.alarms)
        return "\n".join(lines + [problem.bullet() for problem in problems])

    def _tokens(self) -> str:
        prompts = f"after {len(self.request.prompts)} prompts"
        if self.sampled:
            drawn = sum(map(len, self.token_ids))
            return f"{drawn} drawn {prompts}: single ones cannot be checked, their likelihood was"
        counts = f"{self.same} the checkpoint's own, {self.ties} numeric ties, {len(self.faults)} faults"
        return f"{self.same + self.ties + len(self.faults)} checked {prompts}: {counts}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "engine": str(self.request.engine),
            "reference": str(self.request.reference),
            "ok": self.ok,
            "sampled": self.sampled,
            "weights": self.weights,
            "same": self.same,
            "ties": self.ties,
            "faults": [p.as_dict() for p in self.faults],
            "alarms": [p.as_dict() for p in self.alarms],
            "logits": None if self.distributions is None else self.distributions.as_dict(),
            "drafter": None if self.drafts is None else self.drafts.as_dict(),
            "acceptance_length": self.acceptance_length,
            "reference_acceptance_length": self.reference_acceptance_length,
            "steps": None if self.steps is None else self.steps.as_dict(),
            "not_seen": list(self.not_seen),
            "token_ids": [list(ids) for ids in self.token_ids],
        }
