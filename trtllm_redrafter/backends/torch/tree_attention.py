"""Attention over a KV cache and token trees on a GPU, in Triton: rotate and store, attend, combine.

Each row of a pass attends to its own sequence: the committed positions, then its ancestors in the tree, wherever they
are in the cache. The sequence is split into units of `UNIT` positions. A fully committed unit is the same for all nodes
of a tree and is read once for as many of them as fit into a tensor core's tile; the last one or two units are read node
by node. Either way a unit's result comes from the same operations, and units are added in order: a token's bits depend
neither on whether it was drafted or decoded alone, nor on the other rows.

`size` D is the head size, N heads, M KV heads, R rows (all nodes of all trees), C cache positions of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Sequence positions per product."""

UNIT = 256
"""Sequence positions per program, a multiple of BLOCK: long sequences are split among programs."""

_TILE = 16
"""Fewest rows of a tensor-core product: the query heads of one KV head, for as many nodes as fit."""


@triton.jit
def _rotate_and_store_kernel(
    qkv, cosine, sine, q_weight, k_weight, query, keys, values, slots, bases, depths, epsilon,
    width, capacity,
    heads: tl.constexpr, kv_heads: tl.constexpr, size: tl.constexpr, half_block: tl.constexpr, has_norm: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = size // 2
    sequence = row // width
    base = tl.load(bases + sequence)
    column = tl.arange(0, half_block)
    inside = column < half
    source = qkv + (row * (heads + 2 * kv_heads) + head) * size
    low = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half + column, mask=inside, other=0.0).to(tl.float32)
    if head < heads + kv_heads:
        if has_norm:
            scale = 1.0 / tl.sqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / size + epsilon)
            weight = q_weight
            if head >= heads:
                weight = k_weight
            low = low * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            high = high * scale * tl.load(weight + half + column, mask=inside, other=0.0).to(tl.float32)
        angle = (base + tl.load(depths + row)) * size + column
        cos = tl.load(cosine + angle, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sine + angle, mask=inside, other=0.0).to(tl.float32)
        low, high = low * cos - high * sin, high * cos + low * sin
    target = query + (row * heads + head) * size
    if head >= heads:
        kv_head = (head - heads) % kv_heads
        place = base + row % width
        offset = ((tl.load(slots + sequence) * kv_heads + kv_head) * capacity + place) * size
        target = keys + offset
        if head >= heads + kv_heads:
            target = values + offset
    tl.store(target + column, low.to(target.dtype.element_ty), mask=inside)
    tl.store(target + half + column, high.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _attend_kernel(
    query, keys, values, paths, slots, bases, depths, partial, largest, total,
    width, capacity, units, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, size: tl.constexpr, size_block: tl.constexpr,
    tile: tl.constexpr, path_length: tl.constexpr, block: tl.constexpr, unit: tl.constexpr,
):  # fmt: skip
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)  # rows x units x N x D
    group: tl.constexpr = heads // kv_heads
    most: tl.constexpr = tile // group
    sequence, node = row // width, row % width
    base = tl.load(bases + sequence)
    is_padding = tl.load(paths + row * path_length) < 0  # padding comes last: a tile that begins with it is empty
    length = tl.where(is_padding, 0, base + tl.load(depths + row) + 1)
    first = part.to(tl.int64) * unit
    is_shared = first + unit <= base
    count = tl.where(is_shared, tl.minimum(most, width - node), 1)
    if (first < length) & ((not is_shared) | (node % most == 0)):
        member = tl.arange(0, tile)
        column = tl.arange(0, size_block)
        rows = row + member // group
        head = kv_head * group + member % group
        real = member // group < count
        inside = real[:, None] & (column[None, :] < size)
        q = tl.load(query + (rows[:, None] * heads + head[:, None]) * size + column[None, :], mask=inside, other=0.0)
        cache = (tl.load(slots + sequence) * kv_heads + kv_head) * capacity * size
        top = tl.full([tile], float("-inf"), tl.float32)
        sums = tl.zeros([tile], tl.float32)
        out = tl.zeros([tile, size_block], tl.float32)
        for start in range(first, tl.minimum(length, first + unit), block):
            position = start + tl.arange(0, block)
            seen = position < length
            drafted = seen & (position >= base)
            ancestor = tl.load(paths + row * path_length + position - base, mask=drafted, other=0)
            place = tl.where(drafted, base + ancestor, position)
            offset = cache + place[:, None] * size + column[None, :]
            whole = seen[:, None] & (column[None, :] < size)
            k = tl.load(keys + offset, mask=whole, other=0.0)
            v = tl.load(values + offset, mask=whole, other=0.0)
            scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrink = tl.exp(top - higher)
            sums = sums * shrink + tl.sum(weights, 1)
            out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
            top = higher
        target = (rows * units + part) * heads + head
        tl.store(partial + target[:, None] * size + column[None, :], out, mask=inside)
        tl.store(largest + target, top, mask=real)
        tl.store(total + target, sums, mask=real)


@triton.jit
def _combine_kernel(
    partial, largest, total, paths, bases, depths, mixed,
    width, units,
    heads: tl.constexpr, size: tl.constexpr, size_block: tl.constexpr, path_length: tl.constexpr, unit: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, size_block)
    inside = column < size
    is_padding = tl.load(paths + row * path_length) < 0
    length = tl.where(is_padding, 0, tl.load(bases + row // width) + tl.load(depths + row) + 1)
    used = (length + unit - 1) // unit
    top = tl.full([], float("-inf"), tl.float32)
    for part in range(0, used):
        top = tl.maximum(top, tl.load(largest + (row * units + part) * heads + head))
    sums = tl.zeros([], tl.float32)
    out = tl.zeros([size_block], tl.float32)
    for part in range(0, used):
        source = (row * units + part) * heads + head
        weight = tl.exp(tl.load(largest + source) - top)
        sums += tl.load(total + source) * weight
        out += tl.load(partial + source * size + column, mask=inside, other=0.0) * weight
    value = out / tl.where(is_padding, 1.0, sums)
    tl.store(mixed + (row * heads + head) * size + column, value.to(mixed.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class TreeRows:
    """The R = B T rows of a pass. All int64 on the device."""

    slots: Tensor  # [B]
    bases: Tensor  # [B] committed positions
    depths: Tensor  # [B, T]
    paths: Tensor  # [B, T, P] a node's ancestors, root first, then itself repeated; -1: padding


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer."""

    heads: int
    kv_heads: int
    size: int
    epsilon: float


def attend(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    rotary: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    rows: TreeRows,
    sizes: Heads,
    span: int,
) -> Tensor:
    """qkv [R, (N + 2 M) D] -> [R, N D]; keys and values are stored in `cache` ([slots, M, C, D] each) on the way.

    `rotary` are cosine and sine [C, D], `norms` the weights of Qwen3's head norms, `span` an upper bound of all
    sequences' lengths.
    """
    count, width = qkv.shape[0], rows.depths.shape[1]
    keys, values = cache
    capacity = keys.shape[2]
    query = qkv.new_empty(count, sizes.heads * sizes.size)
    q_weight, k_weight = (qkv, qkv) if norms is None else norms
    _rotate_and_store_kernel[(count, sizes.heads + 2 * sizes.kv_heads)](
        qkv, *rotary, q_weight, k_weight, query, keys, values, rows.slots, rows.bases, rows.depths, sizes.epsilon,
        width, capacity,
        heads=sizes.heads, kv_heads=sizes.kv_heads, size=sizes.size,
        half_block=triton.next_power_of_2(sizes.size // 2), has_norm=norms is not None, num_warps=1,
    )  # fmt: skip
    units = -(-span // UNIT)
    shape = (count, units, sizes.heads)
    partial = torch.empty(*shape, sizes.size, dtype=torch.float32, device=qkv.device)
    largest, total = partial.new_empty(shape), partial.new_empty(shape)
    size_block, path_length = max(_TILE, triton.next_power_of_2(sizes.size)), rows.paths.shape[2]
    _attend_kernel[(count, sizes.kv_heads, units)](
        query, keys, values, rows.paths, rows.slots, rows.bases, rows.depths, partial, largest, total,
        width, capacity, units, sizes.size**-0.5,
        heads=sizes.heads, kv_heads=sizes.kv_heads, size=sizes.size, size_block=size_block,
        tile=max(_TILE, triton.next_power_of_2(sizes.heads // sizes.kv_heads)), path_length=path_length,
        block=BLOCK, unit=UNIT, num_warps=4,
    )  # fmt: skip
    mixed = torch.empty_like(query)
    _combine_kernel[(count, sizes.heads)](
        partial, largest, total, rows.paths, rows.bases, rows.depths, mixed, width, units,
        heads=sizes.heads, size=sizes.size, size_block=size_block, path_length=path_length, unit=UNIT, num_warps=1,
    )  # fmt: skip
    return mixed
