"""The verdict on drafting: go, no-go, or not significant, with the figures it is based on.

It follows from the interval of the speed-up, not from its point estimate. An output that drafting changes by more than
rounding explains is a no-go at any speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtllm_redrafter.benchmark.differences import FAULT, TIE, UNEXAMINED
from trtllm_redrafter.benchmark.figures import BatchFigures
from trtllm_redrafter.benchmark.records import Difference
from trtllm_redrafter.benchmark.statistics import FEWEST

GO, NO_GO, NOT_SIGNIFICANT = "go", "no-go", "not significant"


@dataclass(frozen=True)
class Verdict:
    """The answer for one batch size."""

    batch: int
    answer: str
    reason: str

    def render(self) -> str:
        return f"batch {self.batch}: {self.answer}. {self.reason}"

    def as_dict(self) -> dict[str, object]:
        return {"batch": self.batch, "answer": self.answer, "reason": self.reason}


def judge(figures: BatchFigures, differences: Sequence[Difference]) -> Verdict:
    """Go if the whole interval is above 1, no-go if it is below 1; otherwise not significant."""
    faults = sum(d.kind == FAULT for d in differences)
    if faults:
        reason = f"{faults} output(s) differ from autoregression by more than rounding explains; speed does not matter"
        return Verdict(figures.batch, NO_GO, reason)
    speed = figures.speedup
    few = min(figures.drafting.requests, figures.autoregression.requests) < FEWEST
    if few or not speed.low <= speed.high:  # also when nothing was measured: NaN compares false
        return Verdict(figures.batch, NOT_SIGNIFICANT, "too little was measured to say anything")
    if speed.low > 1.0:
        answer = GO
    elif speed.high < 1.0:
        answer = NO_GO
    else:
        answer = NOT_SIGNIFICANT
    return Verdict(figures.batch, answer, _reason(figures, answer) + _doubts(differences))


def _reason(figures: BatchFigures, answer: str) -> str:
    accepted, needed = figures.drafting.acceptance_length, figures.step_time_ratio
    middle = f"Answers come {figures.speedup.render()} times as fast with drafting"
    if accepted is None:
        return f"{middle}; nothing was drafted."
    steps = f"a step brings {accepted:.2f} tokens and costs as much as {needed:.2f} plain steps"
    if answer == GO:
        return f"{middle}: {steps}."
    if answer == NO_GO:
        remedy = "draft less, or train the drafter further" if accepted < needed else "look at time to first token"
        return f"{middle}: {steps}; {remedy}."
    return f"{middle}: {steps}. The interval includes 1; measure more prompts or repeats."


def _doubts(differences: Sequence[Difference]) -> str:
    text = ""
    ties = sum(d.kind == TIE for d in differences)
    unknown = sum(d.kind == UNEXAMINED for d in differences)
    if ties:
        text += f" {ties} output(s) differ by a tie: two tokens closer than rounding."
    if unknown:
        text += f" {unknown} output(s) differ, and this backend does not show why."
    return text
