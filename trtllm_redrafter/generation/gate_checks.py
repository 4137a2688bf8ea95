"""What the parity gate looks at in a text: each token against the checkpoint's law, and what no single token shows.

same, ties, faults = compare(engine, reference, quantized, prompts, results)
alarms = [*token_alarms(engine, results, same, ties)]

Of a sampled text no token is wrong by itself. Its tokens are as likely, on average, as the laws' own entropy says; text
of another model is less likely. That is all that can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_redrafter.backends.base import Result
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.generation.parity import ROUNDING

if TYPE_CHECKING:
    from trtllm_redrafter.backends.torch.runner import TorchRunner

FP8_ROUNDING = 2.0**-3
"""Quantized activations, which the reference does not imitate, come apart further than 16 bits do."""

TIE_ALARM = 0.05
REPEATS_ALARM = 16
UNLIKELY = 6.0
"""Standard errors by which a sampled text may be less likely than a text of these laws is on average."""


def compare(
    engine: Path, reference: TorchRunner, quantized: bool, prompts: Sequence[tuple[int, ...]], results: Sequence[Result]
) -> tuple[int, int, list[Problem]]:
    """Tokens that are the reference's own choice, ties, and a fault per prompt that has one."""
    rounding = ROUNDING[reference.info.dtype]
    if quantized:
        rounding = max(rounding, FP8_ROUNDING)
    same = ties = 0
    faults = []
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True), start=1):
        laws = _laws(reference, prompt, result.token_ids)
        for place, (token, law) in enumerate(zip(result.token_ids, laws, strict=True), start=1):
            gap, best, bound = law.gap(token), law.best, rounding * law.scale
            if gap == 0.0:
                same += 1
            elif gap <= bound:
                ties += 1
            else:
                what = f"token {place} of prompt {number} is {token}, the checkpoint's is {best}"
                why = f"its logit is {gap:.4g} lower, rounding explains {bound:.2g}"
                remedy = "do not serve this engine; build it again, and compare release and checkpoint"
                faults.append(Problem(what, str(engine), why, remedy))
                break  # what follows a wrong token tells nothing more
    return same, ties, faults


@dataclass(frozen=True)
class _Law:
    """One position's logits, as far as they matter."""

    logits: Any  # [V] float32

    @property
    def best(self) -> int:
        return int(self.logits.argmax())

    @property
    def scale(self) -> float:
        return float(self.logits.abs().max())

    def gap(self, token: int) -> float:
        return float(self.logits.max() - self.logits[token])

    def surprise(self, token: int) -> tuple[float, float]:
        """-log p(token) beyond the law's entropy, and the variance that a token drawn from the law gives it."""
        logs = self.logits.double().log_softmax(dim=-1)
        p = logs.exp()
        entropy = -(p * logs).sum()
        return float(-logs[token] - entropy), float((p * (logs + entropy) ** 2).sum())


def sampled_alarms(
    engine: Path, reference: TorchRunner, prompts: Sequence[tuple[int, ...]], results: Sequence[Result]
) -> Iterator[Problem]:
    """TensorRT-LLM's sampling leans towards the drafter's favourites, likely tokens: only the unlikely side alarms."""
    excess = variance = 0.0
    for prompt, result in zip(prompts, results, strict=True):
        for token, law in zip(result.token_ids, _laws(reference, prompt, result.token_ids), strict=True):
            more, spread = law.surprise(token)
            excess, variance = excess + more, variance + spread
    if excess > UNLIKELY * math.sqrt(variance):
        count = sum(len(result.token_ids) for result in results)
        why = f"over {count} tokens, {excess / count:.2f} nats per token less likely than the laws' own entropy"
        remedy = "do not serve this engine; build it again, and compare release and checkpoint"
        yield Problem("the text is not drawn from the checkpoint's laws", str(engine), why, remedy)


def _laws(reference: TorchRunner, prompt: tuple[int, ...], tokens: Sequence[int]) -> Iterator[_Law]:
    """The law of each token, computed along the tokens themselves, in chains no longer than a tree."""
    from trtllm_redrafter.redrafter.token_tree import Tree

    if not tokens:
        return
    shape, executor = reference.info.draft_shape, reference.executor
    width = 1 if shape is None else shape.max_tree_tokens
    yield _Law(executor.prefill(0, prompt).logits.float())
    base = len(prompt)
    for start in range(0, len(tokens) - 1, width):
        chunk = list(tokens[start : min(start + width, len(tokens) - 1)])
        output = executor.forward([0], [base], [Tree.merge([chunk])], logits=True)
        assert output.logits is not None
        executor.commit(0, base, range(len(chunk)))
        base += len(chunk)
        for row in output.logits.float():
            yield _Law(row)


def token_alarms(engine: Path, results: Sequence[Result], same: int, ties: int) -> Iterator[Problem]:
    where = str(engine)
    if ties > TIE_ALARM * max(1, same + ties):
        why = f"{ties} of {same + ties}; rounding alone makes far fewer"
        yield Problem("too many numeric ties", where, why, "look for a tensor of the wrong dtype or scale")
    for number, result in enumerate(results, start=1):
        longest = _longest_run(result.token_ids)
        if longest >= REPEATS_ALARM:
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
