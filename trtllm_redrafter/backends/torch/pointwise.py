"""The operations between a transformer's matrix products, in eager PyTorch.

Rounding follows transformers: norms in float32, everything else in the model's dtype. On a GPU an eager norm takes
eight kernels, each of which costs as much as reading megabytes of weights; `fused` runs them as one.
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
    silu_and_mul: Callable[[Tensor, Tensor], Tensor]


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm over the last dimension, in float32 (in float64 for float64)."""
    wide = x if x.dtype is torch.float64 else x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(x.dtype)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The residual stream with a block's output `delta` added, and its norm."""
    x = x if delta is None else x + delta
    return x, norm(x, weight, epsilon)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of [B, T, N, D]; element i of a head is paired with element i + D / 2."""
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up: the gated MLP's activation."""
    return F.silu(gate) * up


EAGER = Pointwise(norm, add_norm, rotate, silu_and_mul)
