"""The most frequent operations of `pointwise` as one Triton kernel each, with transformers' rounding.

Each program computes one row, so a row's bits do not depend on the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtllm_redrafter.backends.torch.pointwise import EAGER, Pointwise

_SILU_BLOCK = 1024


@triton.jit
def _add_norm_kernel(
    x, delta, weight, total, normed, size, epsilon, has_delta: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < size
    value = tl.load(x + row * size + column, mask=inside, other=0.0)
    if has_delta:
        value = value + tl.load(delta + row * size + column, mask=inside, other=0.0)
        tl.store(total + row * size + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + epsilon)
    scaled = (wide * scale).to(value.dtype)
    tl.store(normed + row * size + column, scaled * tl.load(weight + column, mask=inside, other=0.0), mask=inside)


@triton.jit
def _silu_and_mul_kernel(gate, up, gated, count, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    a = tl.load(gate + place, mask=inside, other=0.0)
    wide = a.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(a.dtype)
    tl.store(gated + place, silu * tl.load(up + place, mask=inside, other=0.0), mask=inside)


def _add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    x, size = x.contiguous(), x.shape[-1]
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    other = x if delta is None else delta.contiguous()
    block = triton.next_power_of_2(size)
    _add_norm_kernel[(x.numel() // size,)](
        x, other, weight, total, normed, size, epsilon,
        has_delta=delta is not None, block=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return total, normed


def _silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    gated = torch.empty_like(gate)
    count = gate.numel()
    _silu_and_mul_kernel[(triton.cdiv(count, _SILU_BLOCK),)](gate, up, gated, count, block=_SILU_BLOCK)
    return gated


FUSED = Pointwise(EAGER.norm, _add_norm, EAGER.rotate, _silu_and_mul)
"""In decoding steps `tree_attention` does the head norms and the rotation; these two run in prefill only."""
