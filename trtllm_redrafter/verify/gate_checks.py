"""What the parity gate looks at in a text: each token against the exact distribution, and what no single token shows.

    found = compare(engine, rows, results)
    alarms = [*token_alarms(engine, results, found)]

Of a sampled text no token is wrong by itself. Its tokens are as likely, on average, as the distributions' own entropy
says; text of another model is less likely. That is all that can be compared.
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
from trtllm_redrafter.verify.reference import Pair
from trtllm_redrafter.verify.ties import gap

FP8_ROUNDING = 2.0**-3
"""Of the largest logit: quantized activations, which the reference does not imitate, come apart further."""

TIE_ALARM = 0.05
TIE_FACTOR = 3
"""Ties may be this share of a text, or this many times as many as rounding makes in it (and as many more)."""

NOISE = 16.0
"""A tie is no wider than this many RMS of what rounding does to the logits of its position."""

REPEATS_ALARM = 16
UNLIKELY = 6.0
"""Standard errors by which a sampled text may be less likely than a text of these distributions is on average."""

REMEDY = "do not serve this engine; build it again, and compare release and checkpoint"


@dataclass(frozen=True)
class TokenCheck:
    """Tokens that are the exact distribution's own choice, ties, how many ties rounding makes, and faults (one per
    prompt at most: what follows a wrong token tells nothing more)."""

    same: int
    ties: int
    usual_ties: int
    faults: tuple[Problem, ...]


def compare(
    engine: Path, pair: Pair, results: Sequence[Result], *, quantized: bool = False, whose: str = "checkpoint"
) -> TokenCheck:
    """`pair` holds the prompts' texts first, in the order of the results that have tokens."""
    same = ties = usual = 0
    faults = []
    for place, (number, result) in enumerate(_with_tokens(results)):
        exact, rounded, shaken = pair.rows(place)
        usual += int((exact.argmax(dim=-1) != rounded.argmax(dim=-1)).sum())
        bounds = _noise(exact, rounded, shaken)
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
                why = f"its logit is {lower:.4g} lower, rounding in {pair.dtype} explains {bound:.2g}"
                faults.append(Problem(what, str(engine), why, REMEDY))
                break
    return TokenCheck(same, ties, usual, tuple(faults))


def _with_tokens(results: Sequence[Result]) -> list[tuple[int, Result]]:
    """Results that are not empty, with their prompt's number."""
    return [(number, result) for number, result in enumerate(results, start=1) if result.token_ids]


def _noise(exact: Tensor, rounded: Tensor, shaken: Sequence[Tensor]) -> list[float]:
    """The widest tie at each position of [n, V], by what rounding does there."""

    def rms(logits: Tensor) -> Tensor:
        difference = logits.to(exact) - exact
        return (difference - difference.mean(dim=-1, keepdim=True)).pow(2).mean(dim=-1).sqrt()

    floor = torch.finfo(torch.float32).eps * exact.abs().amax(dim=-1)
    unit = rounding_unit(rms(rounded), [rms(each) for each in shaken], floor)
    found: list[float] = (NOISE * unit).tolist()
    return found


def sampled_alarms(engine: Path, rows: Iterable[Tensor], results: Sequence[Result]) -> Iterator[Problem]:
    """TensorRT-LLM's sampling leans towards the drafter's favourites, likely tokens: only the unlikely side alarms.

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
    """-log p(token) beyond the distribution's entropy, and the variance that a token drawn from it gives that."""
    logs = logits.double().log_softmax(dim=-1)
    p = logs.exp()
    entropy = -(p * logs).sum()
    return float(-logs[token] - entropy), float((p * (logs + entropy) ** 2).sum())


def token_alarms(engine: Path, results: Sequence[Result], found: TokenCheck | None) -> Iterator[Problem]:
    """`found` is None for a sampled text. Tokens that were all confirmed may repeat: small models do that."""
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
