"""From base-model logits to a token: filtered law, inverse-CDF draw, and one uniform number per output position.

The law of a row is logits / temperature, then top-k, then top-p on what is left, as in transformers (ties at the
border of either filter are all kept, so that a law depends on values alone and not on a sort's habits).
Temperature 0 is greedy: the largest logit, the lowest token id on ties. All arithmetic is float32, whatever
the model's dtype: an inverse CDF with bf16's eight bits cannot reach most of a vocabulary.

`uniform(seed, position)` is a counter-based generator: output position i of a request always meets the same
number, with and without drafting, at any batch size. That is what makes speculative and plain sampling emit the
same tokens, and what lets every node of a tree be drawn at once.

    settings = SamplingSettings.of([SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9)])
    token = draw(logits, settings, uniform([seed], [position]))
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

_FIRST_LOOK = 1024
"""Tokens sorted at first for top-p; a nucleus is rarely larger, and sorting a whole vocabulary costs milliseconds."""


class Sampling(Protocol):
    """The part of a request's sampling parameters that shapes a law."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling parameters of N rows, as tensors, with what can be skipped known beforehand."""

    temperature: Tensor  # [N] float32; 0 is greedy
    top_k: Tensor  # [N] int64; 0 is off
    top_p: Tensor  # [N] float32; 1 is off
    any_sampled: bool
    max_top_k: int
    every_top_k: bool
    any_top_p: bool

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device | str = "cpu") -> SamplingSettings:
        ks = [row.top_k for row in rows]
        return cls(
            temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device),
            top_k=torch.tensor(ks, dtype=torch.int64, device=device),
            top_p=torch.tensor([row.top_p for row in rows], dtype=torch.float32, device=device),
            any_sampled=any(row.temperature > 0.0 for row in rows),
            max_top_k=max(ks, default=0),
            every_top_k=all(k > 0 for k in ks),
            any_top_p=any(row.top_p < 1.0 for row in rows),
        )

    def repeat(self, times: int) -> SamplingSettings:
        """Each row `times` times in a row: the settings of every node of a batch of trees of one size."""
        return self.repeat_each([times] * len(self.top_k))

    def repeat_each(self, times: Sequence[int]) -> SamplingSettings:
        """Row i `times[i]` times in a row."""
        counts = torch.tensor(times, device=self.top_k.device)
        return SamplingSettings(
            self.temperature.repeat_interleave(counts),
            self.top_k.repeat_interleave(counts),
            self.top_p.repeat_interleave(counts),
            self.any_sampled,
            self.max_top_k,
            self.every_top_k,
            self.any_top_p,
        )


def filtered_logits(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """[N, V] -> float32 [N, V] with -inf where the filters forbid a token. Greedy rows are left unscaled."""
    scale = torch.where(settings.temperature > 0.0, settings.temperature, 1.0)
    shifted = logits.float()
    shifted = shifted - shifted.amax(dim=1, keepdim=True)  # a tiny temperature overflows everything but the maximum
    scaled = shifted / scale.unsqueeze(1)
    if settings.max_top_k > 0:
        scaled = _keep_top_k(scaled, settings)
    if settings.any_top_p:
        scaled = _keep_top_p(scaled, settings)
    return scaled


def _keep_top_k(scaled: Tensor, settings: SamplingSettings) -> Tensor:
    width = scaled.shape[1]
    values = scaled.topk(min(settings.max_top_k, width), dim=1).values
    border = values.gather(1, (settings.top_k.clamp(1, values.shape[1]) - 1).unsqueeze(1))
    return scaled.masked_fill((scaled < border) & (settings.top_k > 0).unsqueeze(1), -torch.inf)


def _keep_top_p(scaled: Tensor, settings: SamplingSettings) -> Tensor:
    """Keep a token when those likelier than it hold less than top_p together; the first one always stays.

    Softmax and cumsum treat a row alike whatever stands beside it and however many tokens are looked at; a plain
    sum reduction does not, and would let neighbours decide a border case.
    """
    width = scaled.shape[1]
    probs = scaled.softmax(dim=1)
    top_p = settings.top_p.unsqueeze(1)
    count = min(width, settings.max_top_k if settings.every_top_k else _FIRST_LOOK)
    while True:
        values, order = scaled.topk(count, dim=1)
        mass = probs.gather(1, order).cumsum(dim=1)
        if settings.every_top_k or count == width or bool(((mass[:, -1:] >= top_p) | (top_p >= 1.0)).all()):
            break
        count = min(width, 8 * count)
    kept = 1 + (mass[:, :-1] < top_p).sum(dim=1, keepdim=True)
    border = values.gather(1, kept - 1)
    return scaled.masked_fill((scaled < border) & (top_p < 1.0), -torch.inf)


def greedy(logits: Tensor) -> Tensor:
    """Largest logit, lowest token id on ties. [..., V] -> [...]. (torch's bf16 argmax is slower than a cast.)"""
    return logits.float().argmax(dim=-1)


NOT_FINITE = -1
"""Stands for a token where a row's largest logit is NaN or infinite: there is nothing to choose from."""


def finite_greedy(logits: Tensor) -> Tensor:
    """`greedy`, with `NOT_FINITE` for rows whose largest logit is no number. [..., V] -> [...]; no synchronisation."""
    largest, best = logits.float().max(dim=-1)  # as fast as argmax; the first of equals, and NaN before all
    return torch.where(largest.abs() < torch.inf, best, NOT_FINITE)


def draw(logits: Tensor, settings: SamplingSettings, uniforms: Tensor | None) -> Tensor:
    """One token per row, [N, V] with uniforms [N] in [0, 1): the first whose cumulated probability exceeds u.

    `NOT_FINITE` where a row's largest logit is no number. Uniforms may be None when every row is greedy.
    """
    best = finite_greedy(logits)
    if not settings.any_sampled:
        return best
    if uniforms is None:
        raise TypeError("a sampled row needs a uniform number")
    cumulated = filtered_logits(logits, settings).softmax(dim=1).cumsum(dim=1)
    target = uniforms.to(cumulated).unsqueeze(1) * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, target, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return torch.where((settings.temperature > 0.0) & (best != NOT_FINITE), drawn, best)


def fresh_seed() -> int:
    """A seed for a request that brings none."""
    return secrets.randbits(63)


_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    x = x ^ (x >> np.uint64(31))
    return x


def uniform(seed: ArrayLike, position: ArrayLike) -> Tensor:
    """The number in [0, 1) that output `position` (0: first generated token) of a request with `seed` meets.

    Arguments broadcast; returns float32 on the CPU. It is element `position` of the SplitMix64 sequence that
    starts at the mixed seed; 24 bits, all of them exact in float32.
    """
    start = _mix(np.atleast_1d(np.asarray(seed)).astype(np.uint64) + _GAMMA)
    index = np.atleast_1d(np.asarray(position)).astype(np.uint64) + np.uint64(1)
    word = _mix(start + index * _GAMMA)
    return torch.from_numpy((word >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))
