"""Is the difference of two tokens' logits within rounding? An estimate from the dtype alone.

Rounding can swap two nearly equal logits. The parity gate measures the rounding error at each position
(`gate_checks`); `bench`, which has one engine and no reference, uses a rule of thumb:

    gap(logits, token, other) <= tie_bound(logits, "bfloat16")
"""

from __future__ import annotations

from torch import Tensor

ROUNDING = {"float32": 2.0**-14, "float16": 2.0**-8, "bfloat16": 2.0**-5}
"""How far equal computations may differ, relative to the largest logit: a few units in the last place."""


def gap(logits: Tensor, token: int, other: int | None = None) -> float:
    """How far a token's logit is below the largest of [V], or below another token's (negative if above)."""
    best = logits.max() if other is None else logits[other]
    return float(best - logits[token])


def tie_bound(logits: Tensor, dtype: str) -> float:
    """The widest gap in [V] logits that rounding usually explains."""
    return ROUNDING[dtype] * float(logits.abs().max())
