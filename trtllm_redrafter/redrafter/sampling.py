"""From base-model logits to a token: filters, an inverse-CDF draw, and one uniform number per output position.

A row's distribution is logits / temperature, then top-k, then top-p on what is left, as in transformers, except that
all ties at the threshold of either filter are kept, so that the distribution depends on values alone and not on the
order in which a sort leaves ties. Temperature 0 is greedy: the largest logit, the lowest token id on ties. All
arithmetic is float32, whatever the model's dtype: an inverse CDF in bf16, with its eight bits, cannot reach most of a
vocabulary.

`uniform(seed, position)` is a counter-based generator: output position i of a request always gets the same number,
with and without drafting, at any batch size. Speculative and plain sampling therefore emit the same tokens, and all
nodes of a tree can be drawn at once.

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
"""Tokens sorted first for top-p; a nucleus is rarely larger, and sorting a whole vocabulary takes milliseconds."""


class Sampling(Protocol):
    """The part of a request's sampling parameters that shapes the distribution."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling parameters of N rows as tensors; the plain fields say which filters can be skipped."""

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
        """Each row repeated `times` times: the settings of every node in a batch of trees of one size."""
        return self.repeat_each([times] * len(self.top_k))

    def repeat_each(self, times: Sequence[int]) -> SamplingSettings:
        """Row i repeated `times[i]` times."""
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
    """[N, V] -> float32 [N, V], with -inf where a filter removes a token. Greedy rows are left unscaled."""
    scale = torch.where(settings.temperature > 0.0, settings.temperature, 1.0)
    shifted = logits.float()
    shifted = shifted - shifted.amax(dim=1, keepdim=True)  # keeps a tiny temperature from overflowing
    scaled = shifted / scale.unsqueeze(1)
    if settings.max_top_k > 0:
        scaled = _keep_top_k(scaled, settings)
    if settings.any_top_p:
        scaled = _keep_top_p(scaled, settings)
    return scaled


def _keep_top_k(scaled: Tensor, settings: SamplingSettings) -> Tensor:
    width = scaled.shape[1]
    values = scaled.topk(min(settings.max_top_k, width), dim=1).values
    threshold = values.gather(1, (settings.top_k.clamp(1, values.shape[1]) - 1).unsqueeze(1))
    return scaled.masked_fill((scaled < threshold) & (settings.top_k > 0).unsqueeze(1), -torch.inf)


def _keep_top_p(scaled: Tensor, settings: SamplingSettings) -> Tensor:
    """Keep a token if all likelier ones together have less than top_p; the likeliest always stays.

    Softmax and cumsum give a row the same bits whatever the rest of the batch and however many tokens are sorted. A
    plain sum reduction does not, and other rows would decide cases on the threshold.
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
    threshold = values.gather(1, kept - 1)
    return scaled.masked_fill((scaled < threshold) & (top_p < 1.0), -torch.inf)


def greedy(logits: Tensor) -> Tensor:
    """Largest logit, lowest token id on ties. [..., V] -> [...]. The cast is cheaper than a bf16 argmax."""
    return logits.float().argmax(dim=-1)


NOT_FINITE = -1
"""In place of a token id where a row's largest logit is NaN or infinite, so that there is nothing to choose from."""


def finite_greedy(logits: Tensor) -> Tensor:
    """`greedy`, with `NOT_FINITE` for rows whose largest logit is not finite. [..., V] -> [...]; no device sync."""
    largest, best = logits.float().max(dim=-1)  # as fast as argmax; first of equals, NaN first
    return torch.where(largest.abs() < torch.inf, best, NOT_FINITE)


def draw(logits: Tensor, settings: SamplingSettings, uniforms: Tensor | None) -> Tensor:
    """One token per row of [N, V], with uniforms [N] in [0, 1): the first whose cumulative probability exceeds u.

    `NOT_FINITE` where a row's largest logit is not finite. `uniforms` may be None if every row is greedy.
    """
    best = finite_greedy(logits)
    if not settings.any_sampled:
        return best
    if uniforms is None:
        raise TypeError("a sampled row needs a uniform number")
    cumulative = filtered_logits(logits, settings).softmax(dim=1).cumsum(dim=1)
    target = uniforms.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return torch.where((settings.temperature > 0.0) & (best != NOT_FINITE), drawn, best)


def fresh_seed() -> int:
    """A random seed, for requests without one."""
    return secrets.randbits(63)


_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    x = x ^ (x >> np.uint64(31))
    return x


def uniform(seed: ArrayLike, position: ArrayLike) -> Tensor:
    """The number in [0, 1) for output `position` (0: first generated token) of a request with `seed`.

    Arguments broadcast; the result is float32 on the CPU. It is element `position` of the SplitMix64 sequence that
    starts at the mixed seed, cut to 24 bits, which float32 holds exactly.
    """
    start = _mix(np.atleast_1d(np.asarray(seed)).astype(np.uint64) + _GAMMA)
    index = np.atleast_1d(np.asarray(position)).astype(np.uint64) + np.uint64(1)
    word = _mix(start + index * _GAMMA)
    return torch.from_numpy((word >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))
