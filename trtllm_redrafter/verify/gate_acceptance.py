"""Did the engine take the steps that the checkpoint's drafter takes for the same text? The gate's check of speed.

A wrong drafter changes no token of a greedy text, only the number of steps. `replay` counts the steps that this very
text takes, so both counts are compared by prompt and by position; too few and too many are both alarms.

    compared = AcceptanceCheck(found, expected, diverged, tolerance("bfloat16", ...), sampled)
    compared.render(), list(compared.alarms(engine, draft_len, floor))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_redrafter.backends.base import Result, acceptance_length
from trtllm_redrafter.errors import Problem

if TYPE_CHECKING:
    from trtllm_redrafter.verify.replay import Steps

TOLERANCE = {"float32": 0.02, "float16": 0.05, "bfloat16": 0.05}
"""Share of all prompts' steps, for their number and for those that accept a draft at each position. In bfloat16,
correct engines were within 0.025 (docs/tensorrt-llm.md); one that drafts from the previous position was 0.23 off."""

SINGLE_STEPS = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.1}
"""Share of the steps beginning at the same token that may accept another number of drafts than the replay's do."""

QUANTIZED_TOLERANCE = 0.15
"""With quantized activations, which the reference does not have; not measured on such an engine."""

SAMPLED_TOLERANCE = 0.25
"""For sampled texts, of which only an upper bound of the accepted drafts is known."""

PROMPT_TOLERANCE = 0.15
"""Share of one prompt's steps, where a single lucky draft counts for more."""

MAX_DIVERGED = 0.1
"""Share of steps that may diverge through ties; 0.02 was seen in bfloat16."""

FEW_STEPS = 3
"""A difference of this many steps is never an alarm."""

MIN_STEPS = 16
"""With fewer steps than this, acceptance is not judged."""

MIN_ACCEPTED = 8
"""If the replay accepts this many drafts at a position, the engine must accept at least one."""


def tolerance(dtype: str, *, quantized: bool, sampled: bool) -> float:
    """By how much a correct engine's steps may differ, as a share of them."""
    if sampled:
        return SAMPLED_TOLERANCE
    return QUANTIZED_TOLERANCE if quantized else TOLERANCE[dtype]


@dataclass(frozen=True)
class StepCounts:
    """Steps of each prompt, and drafts accepted in all of them. `accepted_per_position` is empty if not known."""

    steps: tuple[int, ...]
    accepted: int
    accepted_per_position: tuple[int, ...]

    @classmethod
    def of_results(cls, results: Sequence[Result]) -> StepCounts:
        """The engine's own counts."""
        known = all(result.accepted_per_position for result in results if result.steps)
        at = (
            zip(*(result.accepted_per_position for result in results if result.accepted_per_position), strict=True)
            if known
            else ()
        )
        accepted = sum(result.accepted_tokens for result in results)
        return cls(tuple(result.steps for result in results), accepted, tuple(sum(counts) for counts in at))

    @classmethod
    def of_replay(cls, texts: Sequence[Steps], draft_len: int) -> StepCounts:
        at = [text.accepted_per_position(draft_len) for text in texts]
        steps = tuple(len(text.accepted) for text in texts)
        return cls(steps, sum(map(sum, at)), tuple(map(sum, zip(*at, strict=True))))

    @property
    def total(self) -> int:
        return sum(self.steps)

    @property
    def acceptance_length(self) -> float | None:
        return acceptance_length(self.total, self.accepted)

    def is_full(self, draft_len: int) -> bool:
        """Was every draft accepted? A text's end may cut its last step short."""
        return self.accepted >= draft_len * (self.total - len(self.steps))

    def as_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "accepted_per_position": list(self.accepted_per_position)}


@dataclass(frozen=True)
class SingleSteps:
    """Steps of engine and replay that begin at the same token of a text, and how many of them accept differently.

    Totals hide a fault that loses a draft in one step and gains one in another; single steps do not.
    """

    compared: int
    apart: int

    @classmethod
    def of(cls, found: Sequence[Sequence[int] | None], expected: Sequence[Sequence[int]]) -> SingleSteps:
        """Drafts accepted in each step, per text; None where an engine does not report single steps."""
        compared = apart = 0
        for ours, theirs in zip(found, expected, strict=True):
            one, other = _by_start(ours or ()), _by_start(theirs)
            shared = one.keys() & other.keys()
            compared += len(shared)
            apart += sum(one[place] != other[place] for place in shared)
        return cls(compared, apart)


def _by_start(accepted: Sequence[int]) -> dict[int, int]:
    """Steps by the token they begin at; the last one, cut short by the text's end, is left out."""
    starts, place = {}, 0
    for count in accepted[:-1]:
        starts[place] = count
        place += count + 1
    return starts


@dataclass(frozen=True)
class AcceptanceCheck:
    """`found`: the engine's steps; `expected`: the replay's, of which `diverged` do not follow the text."""

    found: StepCounts
    expected: StepCounts
    diverged: int
    tolerance: float
    sampled: bool
    single: SingleSteps = SingleSteps(0, 0)
    single_tolerance: float = 1.0

    def render(self) -> str:
        """Two lines for the report."""
        found, expected = self.found.acceptance_length, self.expected.acceptance_length
        if found is None or expected is None:
            return "  acceptance  nothing was decoded in steps"
        bound = "at most " if self.sampled else ""
        text = (
            f"  acceptance  {found:.2f} tokens per step, the drafter gives this text {bound}{expected:.2f}: "
            f"{self.found.total} steps, {self.expected.total} expected"
        )
        if self.diverged:
            text += f" ({self.diverged} diverged by ties)"
        if self.single.compared:
            text += f"; {self.single.apart} of {self.single.compared} that begin alike accept differently"
        if self.found.accepted_per_position:
            pairs = zip(self.found.accepted_per_position, self.expected.accepted_per_position, strict=True)
            text += "\n  at least 1, 2, ... drafts accepted in " + ", ".join(f"{a} ({e})" for a, e in pairs)
        return text

    def as_dict(self) -> dict[str, Any]:
        return {
            "found": self.found.as_dict(),
            "expected": self.expected.as_dict(),
            "diverged": self.diverged,
            "tolerance": self.tolerance,
            "single_steps": {"compared": self.single.compared, "apart": self.single.apart},
        }

    def alarms(self, engine: Path, draft_len: int, floor: float | None) -> Iterator[Problem]:
        where = str(engine)
        found, expected = self.found.acceptance_length, self.expected.acceptance_length
        if found is None or expected is None or self.found.total < MIN_STEPS:
            why = f"{self.found.total} steps; at least {MIN_STEPS} are needed"
            yield Problem("too little was written to judge acceptance", where, why, "use more prompts or --max-tokens")
            return
        if found == 1.0 and expected > 1.0:
            why = "the drafter is not connected, or its weights are wrong"
            yield Problem("no draft was ever accepted", where, why, "verify the checkpoint; check release and dtype")
        elif self.found.is_full(draft_len) and (self._diverges_often or not self.expected.is_full(draft_len)):
            why = "drafts are accepted without being verified"
            yield Problem("every draft was accepted", where, why, "do not serve this engine")
        else:
            yield from self._differences(where)
        if floor is not None and found < floor:
            what = f"acceptance is {found:.2f}, the floor is {floor:.2f}"
            yield Problem(what, where, None, "train the drafter further, or lower the floor")

    @property
    def _allowed(self) -> float:
        return max(FEW_STEPS, self.tolerance * self.expected.total)

    @property
    def _diverges_often(self) -> bool:
        return self.diverged > max(FEW_STEPS, max(MAX_DIVERGED, self.tolerance) * self.expected.total)

    def _differences(self, where: str) -> Iterator[Problem]:
        if self._diverges_often:
            why = f"TensorRT-LLM's rule leaves the text in {self.diverged} of {self.expected.total} steps"
            remedy = "do not serve this engine; build it again, and compare release and checkpoint"
            yield Problem("drafts were accepted that the checkpoint refuses, or the reverse", where, why, remedy)
        reasons = [*self._reasons()]
        if reasons:
            remedy = "check release and drafter; compare the drafter's tensors with `verify` on the checkpoint"
            yield Problem("acceptance differs from the checkpoint's", where, "; ".join(reasons), remedy)

    def _reasons(self) -> Iterator[str]:
        """Where the counts differ: in total, by prompt, by position."""
        if abs(self.found.total - self.expected.total) > self._allowed:
            yield f"{self.found.total} steps where these texts take {self.expected.total}"
        single = self.single
        if single.apart > max(FEW_STEPS, self.single_tolerance * single.compared):
            yield f"{single.apart} of {single.compared} steps that begin alike accept another number of drafts"
        share = max(PROMPT_TOLERANCE, self.tolerance)
        for number, (found, expected) in enumerate(zip(self.found.steps, self.expected.steps, strict=True), start=1):
            if abs(found - expected) > max(FEW_STEPS, share * expected):
                yield f"prompt {number}: {found} steps where its text takes {expected}"
        at = zip(self.found.accepted_per_position, self.expected.accepted_per_position, strict=False)
        for place, (found, expected) in enumerate(at, start=1):
            if abs(found - expected) > self._allowed or (found == 0 and expected >= MIN_ACCEPTED):
                yield f"position {place}: {found} drafts accepted where {expected} stand in the texts"
