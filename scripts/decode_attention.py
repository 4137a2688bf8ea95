"""One query position against a long cache, for thousands of sequences: the kernel decoding waits for.

A decoding step reads every cached key and value once and does little arithmetic on them, so it should run at the
memory's speed. Batched matrix products of three query rows do not; this kernel gives each (sequence, key/value head)
one program that streams its cache through once with a running softmax. Left padding is skipped by its length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
MIN_ROWS = 16
"""Fewest rows of a matrix product on the matrix units; the few queries that share a head are padded to it."""


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    fill,
    out,
    end,
    stride_sequence,
    stride_head,
    scale,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    dim: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
):
    sequence = tl.program_id(0) // kv_heads
    head = tl.program_id(0) % kv_heads
    row = tl.arange(0, rows)
    column = tl.arange(0, dim)
    place = (tl.program_id(0) * group + row[:, None]) * dim + column[None, :]
    q = tl.load(query + place, mask=row[:, None] < group, other=0.0)
    first = tl.load(fill + sequence).to(tl.int32)
    cache = sequence.to(tl.int64) * stride_sequence + head * stride_head
    peak = tl.full([rows], -1.0e30, tl.float32)
    total = tl.zeros([rows], tl.float32)
    mixed = tl.zeros([rows, dim], tl.float32)
    for start in range(0, end, block):
        slot = start + tl.arange(0, block)
        real = (slot < end) & (slot >= first)
        at = cache + slot[:, None] * dim + column[None, :]
        k = tl.load(keys + at, mask=real[:, None], other=0.0)
        v = tl.load(values + at, mask=real[:, None], other=0.0)
        score = tl.where(real[None, :], tl.dot(q, tl.trans(k)) * scale, -1.0e30)
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.where(real[None, :], tl.exp(score - higher[:, None]), 0.0)
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        peak = higher
    tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=row[:, None] < group)


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, fill: Tensor, end: int) -> Tensor:
    """Attention of one position over slots fill..end of its sequence's cache.

    query [B, heads, D]; keys and values [B, KV, T, D], slots contiguous; fill [B]. Returns [B, heads, D].
    """
    query = query.contiguous()
    count, heads, dim = query.shape
    kv_heads = keys.shape[1]
    out = torch.empty_like(query)
    _kernel[(count * kv_heads,)](
        query,
        keys,
        values,
        fill,
        out,
        end,
        keys.stride(0),
        keys.stride(1),
        dim**-0.5,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        dim=dim,
        block=BLOCK,
        rows=MIN_ROWS,
    )
    return out
