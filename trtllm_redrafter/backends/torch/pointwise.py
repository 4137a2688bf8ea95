"""The operations between a transformer's matrix products, as PyTorch writes them.

Rounding follows transformers: norms in float32, everything else in the model's dtype. On a GPU a norm written like this
is eight kernels, and each costs as much as reading megabytes of weights; `fused` has them as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Pointwise:
    """One implementation of each operation."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate: Callable[[Tensor, Tensor], Tensor]


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm over the last dimension, in float32 (float64 stays what it is)."""
    wide = x if x.dtype is torch.float64 else x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(x.dtype)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The residual stream with a block's output added, and its norm."""
    x = x if delta is None else x + delta
    return x, norm(x, weight, epsilon)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate [B, T, N, D] by its positions; the two halves of a head are the pairs."""
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine


def gate(activated: Tensor, linear: Tensor) -> Tensor:
    """SiLU(a) * b."""
    return F.silu(activated) * linear


EAGER = Pointwise(norm, add_norm, rotate, gate)
