"""How far apart are two tokens, and is that more than rounding? Where nothing better is known than the dtype.

Two nearly equal logits may change places when they are rounded. The parity gate measures what rounding does at each
position (`gate_checks`); `bench`, which has one engine and no reference, takes a rule of thumb:

    gap(logits, token, other) <= tie_bound(logits, "bfloat16")
"""

from __future__ import annotations

from torch import Tensor

ROUNDING = {"float32": 2.0**-14, "float16": 2.0**-8, "bfloat16": 2.0**-5}
"""How far equal computations may come apart, relative to the largest logit: a few units in the last place."""


def gap(logits: Tensor, token: int, other: int | None = None) -> float:
    """How far a token's logit is below the largest of [V], or below (above: negative) that of another token."""
    best = logits.max() if other is None else logits[other]
    return float(best - logits[token])


def tie_bound(logits: Tensor, dtype: str) -> float:
    """The widest gap in [V] logits that rounding usually explains."""
    return ROUNDING[dtype] * float(logits.abs().max())
