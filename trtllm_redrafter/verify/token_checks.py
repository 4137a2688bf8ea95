"""The parity gate's checks of a text: each token against its exact distribution, and signs that no single token shows.

    found = check_tokens(engine, rows, results)
    alarms = [*token_alarms(engine, results, found)]

In a sampled text no token is wrong by itself. On average its tokens' negative log-likelihood is the distributions'
entropy, and higher in another model's text; nothing else can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trtllm_redrafter.backends.base import Result
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.verify.distributions import rounding_unit
from trtllm_redrafter.verify.reference import ReferenceLogits

ROUNDING = {"float32": 2.0**-14, "float16": 2.0**-8, "bfloat16": 2.0**-5}
"""How far equal computations may differ, relative to the largest logit: a few units in the last place. A rule of thumb
for `bench`, which has one engine and no reference; the gate measures the rounding error at each position."""

FP8_ROUNDING = 2.0**-3
"""Widest tie relative to the largest logit, with quantized activations, which the reference does not have."""

TIE_ALARM = 0.05
TIE_FACTOR = 3
"""Alarm if ties exceed this share of a text and this factor times the ties that rounding makes in it (plus one)."""

NOISE = 16.0
"""A tie is at most this many RMS wide, in units of the rounding error at its position."""

REPEATS_ALARM = 16
UNLIKELY = 6.0
"""Standard errors by which a sampled text may be less likely than text drawn from these distributions."""

REMEDY = "do not serve this engine; build it again, and compare release and checkpoint"


def gap(logits: Tensor, token: int, other: int | None = None) -> float:
    """How far a token's logit is below the largest of [V], or below another token's (negative if above)."""
    best = logits.max() if other is None else logits[other]
    return float(best - logits[token])


def tie_bound(logits: Tensor, dtype: str) -> float:
    """The widest gap in [V] logits that rounding usually explains."""
    return ROUNDING[dtype] * float(logits.abs().max())


@dataclass(frozen=True)
class TokenCheck:
    """Counts of tokens that are the exact distribution's choice, and of ties; faults, at most one per prompt, since
    tokens after a wrong one mean nothing. `usual_ties`: ties that rounding makes in these texts."""

    same: int
    ties: int
    usual_ties: int
    faults: tuple[Problem, ...]


def check_tokens(
    engine: Path,
    reference: ReferenceLogits,
    results: Sequence[Result],
    *,
    quantized: bool = False,
    whose: str = "checkpoint",
) -> TokenCheck:
    """`reference` begins with the prompts' texts, in the order of the results that have tokens."""
    same = ties = usual = 0
    faults = []
    for place, (number, result) in enumerate(_with_tokens(results)):
        exact, rounded, perturbed = reference.rows(place)
        usual += int((exact.argmax(dim=-1) != rounded.argmax(dim=-1)).sum())
        bounds = _noise(exact, rounded, perturbed)
        if quantized:
            bounds = [
                max(bound, FP8_ROUNDING * float(row.abs().max())) for bound, row in zip(bounds, exact, strict=True)
            ]
        for at, (token, row, bound) in enumerate(zip(result.token_ids, exact, bounds, strict=True), start=1):
            lower = gap(row, token)
            if lower == 0.0:
                same += 1
            elif lower <= bound:
                ties += 1
            else:
                what = f"token {at} of prompt {number} is {token}, the {whose}'s is {int(row.argmax())}"
                why = f"its logit is {lower:.4g} lower, rounding in {reference.dtype} explains {bound:.2g}"
                faults.append(Problem(what, str(engine), why, REMEDY))
                break
    return TokenCheck(same, ties, usual, tuple(faults))


def _with_tokens(results: Sequence[Result]) -> list[tuple[int, Result]]:
    """Results with tokens, each with its prompt's number."""
    return [(number, result) for number, result in enumerate(results, start=1) if result.token_ids]


def _noise(exact: Tensor, rounded: Tensor, perturbed: Sequence[Tensor]) -> list[float]:
    """The widest tie at each position of [n, V], from the rounding error there."""

    def rms(logits: Tensor) -> Tensor:
        difference = logits.to(exact) - exact
        return (difference - difference.mean(dim=-1, keepdim=True)).pow(2).mean(dim=-1).sqrt()

    floor = torch.finfo(torch.float32).eps * exact.abs().amax(dim=-1)
    unit = rounding_unit(rms(rounded), [rms(each) for each in perturbed], floor)
    found: list[float] = (NOISE * unit).tolist()
    return found


def sampled_alarms(engine: Path, rows: Iterable[Tensor], results: Sequence[Result]) -> Iterator[Problem]:
    """Alarm if a sampled text is too unlikely; TensorRT-LLM's rule favours likely tokens, so the other side is normal.

    `rows` are the exact logits [n, V] of each result that has tokens.
    """
    excess = variance = 0.0
    for logits, (_, result) in zip(rows, _with_tokens(results), strict=True):
        for row, token in zip(logits, result.token_ids, strict=True):
            more, spread = _surprise(row, token)
            excess, variance = excess + more, variance + spread
    if excess > UNLIKELY * math.sqrt(variance):
        count = sum(len(result.token_ids) for result in results)
        why = f"over {count} tokens, {excess / count:.2f} nats per token less likely than the distributions' entropy"
        yield Problem("the text is not drawn from the checkpoint's distributions", str(engine), why, REMEDY)


def _surprise(logits: Tensor, token: int) -> tuple[float, float]:
    """-log p(token) minus the distribution's entropy, and the variance of that for a token drawn from it."""
    logs = logits.double().log_softmax(dim=-1)
    p = logs.exp()
    entropy = -(p * logs).sum()
    return float(-logs[token] - entropy), float((p * (logs + entropy) ** 2).sum())


def token_alarms(engine: Path, results: Sequence[Result], found: TokenCheck | None) -> Iterator[Problem]:
    """`found` is None for sampled texts. Repetition is no alarm where all tokens are confirmed: small models do it."""
    where = str(engine)
    confirmed = found is not None and not found.faults
    if found is not None:
        count = found.same + found.ties
        if found.ties > max(TIE_ALARM * max(1, count), TIE_FACTOR * (found.usual_ties + 1)):
            why = f"{found.ties} of {count}; rounding makes {found.usual_ties} in these texts"
            yield Problem("too many numeric ties", where, why, "look for a tensor of the wrong dtype or scale")
    for number, result in enumerate(results, start=1):
        longest = _longest_run(result.token_ids)
        if longest >= REPEATS_ALARM and not confirmed:
            why = "NaN logits and a broken cache show like this"
            yield Problem(f"prompt {number} repeats one token {longest} times", where, why, "do not serve this engine")
        if not result.token_ids:
            yield Problem(f"prompt {number} has no tokens", where, None, "look at the executor's log")


def _longest_run(tokens: Sequence[int]) -> int:
    longest = run = 0
    for place, token in enumerate(tokens):
        run = run + 1 if place and token == tokens[place - 1] else 1
        longest = max(longest, run)
    return longest
