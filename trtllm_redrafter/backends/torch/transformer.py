"""The base model in plain PyTorch: the reference for every dtype and device, and the fallback for faster executors.

A step is one forward pass over B trees of T nodes, padded to the same T. Keys and values of node i go to cache
position base + i; with a mask, a node attends to the committed positions, its ancestors and itself. After
verification, `commit` moves the accepted nodes to consecutive positions.

Rounding follows transformers: norms in float32, everything else in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from trtllm_redrafter.backends.torch.executor import PREFILL_CHUNK, PromptOutput, TreeOutput
from trtllm_redrafter.backends.torch.pointwise import EAGER, Pointwise
from trtllm_redrafter.backends.torch.rope import rotary_tables
from trtllm_redrafter.backends.torch.weights import LayerWeights, ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.redrafter.sampling import finite_greedy
from trtllm_redrafter.redrafter.token_tree import Tree, pad

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All backends but cuDNN's, which makes a new plan for every prompt length: 150 ms each on an H200."""

_CACHE_BUCKET = 64
"""Attention reads the cache in multiples of this many positions, so that shapes repeat."""


Attend = Callable[[int, LayerWeights, Tensor], Tensor]
"""Layer index, its weights, qkv [B, T, (N + 2 N_kv) D] -> [B, T, N D]. Also stores keys and values in the cache."""


@dataclass(frozen=True)
class Rows:
    """Positions of the T tokens of each of B sequences, on the device."""

    slots: Tensor  # [B] int64
    bases: Tensor  # [B] int64, committed positions
    depths: Tensor  # [B, T] int64, position relative to the base
    mask: Tensor  # [B, T, T] bool; [b, i, j]: token i attends to token j


class TorchExecutor:
    """Base model plus KV cache [layers, slots, N_kv, capacity, D] on one device."""

    name = "pytorch"
    row_invariant = False
    pool: Any = None

    def __init__(
        self,
        config: CheckpointConfig,
        weights: ModelWeights,
        *,
        max_batch_size: int,
        capacity: int,
        detail: str = "",
        pointwise: Pointwise = EAGER,
        qk_epsilon: float | None = None,
    ) -> None:
        """`qk_epsilon`: epsilon of the q/k norms if it is not the model's own (see `verify.reference`)."""
        self.detail = detail
        self._qk_epsilon = config.norm_epsilon if qk_epsilon is None else qk_epsilon
        self._pointwise = pointwise
        self._config = config
        self._weights = weights
        self._capacity = -(-capacity // _CACHE_BUCKET) * _CACHE_BUCKET
        reference = weights.embedding
        self._device = reference.device
        self.device = str(reference.device)
        shape = (
            config.num_hidden_layers,
            max_batch_size,
            config.num_key_value_heads,
            self._capacity,
            config.head_size,
        )
        self._keys = torch.zeros(shape, dtype=reference.dtype, device=self._device)
        self._values = torch.zeros_like(self._keys)
        cosine, sine = rotary_tables(config.head_size, config.rotary_base, config.rotary_scaling, self._capacity)
        self._cosine = torch.cat([cosine, cosine], dim=-1).to(reference)
        self._sine = torch.cat([sine, sine], dim=-1).to(reference)

    def prefill(self, slot: int, token_ids: Sequence[int]) -> PromptOutput:
        hidden = self._chain(slot, token_ids)[-1][-1]
        return PromptOutput(hidden, F.linear(hidden, self._weights.head))

    def prefill_all(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[PromptOutput]:
        return [self.prefill(slot, prompt) for slot, prompt in zip(slots, prompts, strict=True)]

    def hidden_states(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        return torch.cat(self._chain(slot, token_ids))

    @torch.no_grad()
    def forward(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, logits: bool) -> TreeOutput:
        tokens, depths, mask = pad(trees, self._device)
        span = self._span(max(bases) + tokens.shape[1])
        rows = Rows(self._index(slots), self._index(bases), depths, mask)
        padded = self._layers(tokens, self._masked(rows, span))
        hidden = torch.cat([rows[: len(tree)] for rows, tree in zip(padded, trees, strict=True)])
        scores = F.linear(hidden, self._weights.head)
        return TreeOutput(hidden, finite_greedy(scores), scores if logits else None)

    def commit(self, slot: int, base: int, path: Sequence[int]) -> None:
        if all(node == place for place, node in enumerate(path)):
            return
        source = base + torch.tensor(path, device=self._device)
        for cache in (self._keys, self._values):
            cache[:, slot, :, base : base + len(path)] = cache[:, slot, :, source]

    def clear(self, slot: int, first: int, last: int) -> None:
        for cache in (self._keys, self._values):
            cache[:, slot, :, first:] = 0  # past `last` as well, where padding was written

    def undrafted(self) -> TorchExecutor:
        return self

    def threads(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        nothing = torch.empty(0)
        self._keys = self._values = nothing
        self._weights = ModelWeights(nothing, (), nothing, nothing)

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), device=self._device)

    def _span(self, needed: int) -> int:
        """Number of cache positions that attention reads when `needed` are in use."""
        return min(self._capacity, -(-needed // _CACHE_BUCKET) * _CACHE_BUCKET)

    @torch.no_grad()
    def _chain(self, slot: int, token_ids: Sequence[int]) -> list[Tensor]:
        """Hidden states [n, H] of a prompt, chunk by chunk."""
        states = []
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = self._index(token_ids[start : start + PREFILL_CHUNK]).unsqueeze(0)
            count = chunk.shape[1]
            depths = torch.arange(count, device=self._device).unsqueeze(0)
            mask = torch.ones(1, count, count, dtype=torch.bool, device=self._device).tril()
            rows = Rows(self._index([slot]), self._index([start]), depths, mask)
            states.append(self._layers(chunk, self._masked(rows, self._span(start + count)))[0])
        return states

    @torch.no_grad()
    @sdpa_kernel(_KERNELS)
    def _layers(self, tokens: Tensor, attend: Attend) -> Tensor:
        """[B, T] tokens -> [B, T, H] after the final norm. Never waits for the device."""
        x, ops, epsilon = F.embedding(tokens, self._weights.embedding), self._pointwise, self._config.norm_epsilon
        delta: Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            x, normed = ops.add_norm(x, delta, layer.input_norm, epsilon)
            mixed = attend(index, layer, F.linear(normed, layer.qkv, layer.qkv_bias))
            x, normed = ops.add_norm(x, F.linear(mixed, layer.dense, layer.dense_bias), layer.post_norm, epsilon)
            delta = self._mlp(layer, normed)
        return ops.add_norm(x, delta, self._weights.final_norm, epsilon)[1]

    def _masked(self, rows: Rows, span: int) -> Attend:
        """PyTorch's attention: every row reads `span` cache positions through a mask."""
        width = rows.depths.shape[1]
        places = rows.bases.unsqueeze(1) + torch.arange(width, device=self._device)  # [B, T] where keys go
        positions = rows.bases.unsqueeze(1) + rows.depths
        rotation = self._cosine[positions].unsqueeze(2), self._sine[positions].unsqueeze(2)  # [B, T, 1, D]
        mask = self._attention_mask(rows, places, span)

        def attend(index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
            query, key, value = self._rotated(layer, qkv, rotation)
            keys, values = self._keys[index], self._values[index]
            keys[rows.slots.unsqueeze(1), :, places] = key
            values[rows.slots.unsqueeze(1), :, places] = value
            return self._mix(query, keys[rows.slots, :, :span], values[rows.slots, :, :span], mask)

        return attend

    def _attention_mask(self, rows: Rows, places: Tensor, span: int) -> Tensor:
        """[B, 1, G T, span] bool. The G query heads that share a KV head become rows of one product."""
        batch, width = places.shape
        committed = torch.arange(span, device=self._device).view(1, 1, -1) < rows.bases.view(-1, 1, 1)
        mask = committed.expand(batch, width, span).clone()
        mask.scatter_(2, places.unsqueeze(1).expand(batch, width, width), rows.mask)
        groups = self._config.num_attention_heads // self._config.num_key_value_heads
        return mask.unsqueeze(1).expand(batch, groups, width, span).reshape(batch, 1, groups * width, span)

    def _rotated(
        self, layer: LayerWeights, qkv: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, (N + 2 N_kv) D] -> queries, keys and values [B, T, heads, D], queries and keys rotated."""
        config, ops = self._config, self._pointwise
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        split = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, config.head_size)
        query, key, value = torch.split(split, [heads, kv_heads, kv_heads], dim=2)
        if layer.q_norm is not None and layer.k_norm is not None:
            query = ops.norm(query, layer.q_norm, self._qk_epsilon)
            key = ops.norm(key, layer.k_norm, self._qk_epsilon)
        return ops.rotate(query, *rotation), ops.rotate(key, *rotation), value

    def _mix(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Queries [B, T, N, D] over keys and values [B, N_kv, span, D] -> [B, T, N D]."""
        batch, width, heads, size = query.shape
        kv_heads = keys.shape[1]
        grouped = query.view(batch, width, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
        grouped = grouped.reshape(batch, kv_heads, -1, size)
        mixed = F.scaled_dot_product_attention(grouped, keys, values, mask)
        mixed = mixed.view(batch, kv_heads, -1, width, size).permute(0, 3, 1, 2, 4)
        return mixed.reshape(batch, width, heads * size)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        gate, up = F.linear(x, layer.gate_proj, layer.gate_proj_bias), F.linear(x, layer.up_proj, layer.up_proj_bias)
        gated = self._pointwise.silu_and_mul(gate, up)
        return F.linear(gated, layer.down_proj, layer.down_proj_bias)
