"""The base model in plain PyTorch: reference for every dtype and device, and the fallback where nothing faster runs.

A step is one forward pass over B trees of T nodes, padded to the same T. Keys and values of node i go to cache
position base + i; a mask lets a node see the committed positions, its ancestors and itself. After verification
`commit` moves the accepted nodes together.

Rounding follows transformers: norms in float32, everything else in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.backends.torch.executor import PREFILL_CHUNK, PromptOutput, TreeOutput
from trtllm_redrafter.backends.torch.rope import rotary_tables
from trtllm_redrafter.backends.torch.weights import LayerWeights, ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.redrafter.sampling import greedy
from trtllm_redrafter.redrafter.token_tree import Tree, pad

_CACHE_BUCKET = 64
"""Attention reads the cache in multiples of this many positions, so that shapes repeat."""


class TorchExecutor:
    """Base model plus KV cache [layers, slots, N_kv, capacity, D] on one device."""

    name = "pytorch"
    row_invariant = False

    def __init__(
        self, config: CheckpointConfig, weights: ModelWeights, *, max_batch_size: int, capacity: int, detail: str = ""
    ) -> None:
        self.detail = detail
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

    def hidden_states(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        return torch.cat(self._chain(slot, token_ids))

    @torch.no_grad()
    def forward(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, logits: bool) -> TreeOutput:
        tokens, depths, mask = pad(trees, self._device)
        padded = self._layers(slots, bases, tokens, depths, mask)
        hidden = torch.cat([rows[: len(tree)] for rows, tree in zip(padded, trees, strict=True)])
        scores = F.linear(hidden, self._weights.head)
        return TreeOutput(hidden, greedy(scores), scores if logits else None)

    def commit(self, slot: int, base: int, path: Sequence[int]) -> None:
        if all(node == place for place, node in enumerate(path)):
            return
        source = base + torch.tensor(path, device=self._device)
        for cache in (self._keys, self._values):
            cache[:, slot, :, base : base + len(path)] = cache[:, slot, :, source]

    def close(self) -> None:
        self._keys = self._values = torch.empty(0)

    @torch.no_grad()
    def _chain(self, slot: int, token_ids: Sequence[int]) -> list[Tensor]:
        """Hidden states [n, H] of a prompt, chunk by chunk."""
        states = []
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = torch.tensor([token_ids[start : start + PREFILL_CHUNK]], device=self._device)
            count = chunk.shape[1]
            depths = torch.arange(count, device=self._device).unsqueeze(0)
            mask = torch.ones(1, count, count, dtype=torch.bool, device=self._device).tril()
            states.append(self._layers([slot], [start], chunk, depths, mask)[0])
        return states

    @torch.no_grad()
    def _layers(
        self, slots: Sequence[int], bases: Sequence[int], tokens: Tensor, depths: Tensor, tree_mask: Tensor
    ) -> Tensor:
        """[B, T] tokens -> [B, T, H] after the final norm."""
        width = tokens.shape[1]
        base = torch.tensor(bases, device=self._device)
        places = base.unsqueeze(1) + torch.arange(width, device=self._device)  # [B, T] where keys go
        positions = base.unsqueeze(1) + depths
        span = min(self._capacity, -(-(max(bases) + width) // _CACHE_BUCKET) * _CACHE_BUCKET)
        mask = self._attention_mask(base, places, tree_mask, span)
        slot_index = torch.tensor(slots, device=self._device)
        rotation = self._cosine[positions].unsqueeze(2), self._sine[positions].unsqueeze(2)  # [B, T, 1, D]
        x = F.embedding(tokens, self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            normed = self._norm(x, layer.input_norm)
            x = x + self._attention(index, layer, normed, rotation, slot_index, places, mask, span)
            x = x + _mlp(layer, self._norm(x, layer.post_norm))
        return self._norm(x, self._weights.final_norm)

    def _attention_mask(self, base: Tensor, places: Tensor, tree_mask: Tensor, span: int) -> Tensor:
        """[B, 1, T, span] bool."""
        batch, width = places.shape
        committed = torch.arange(span, device=base.device).view(1, 1, -1) < base.view(-1, 1, 1)
        mask = committed.expand(batch, width, span).clone()
        columns = places.unsqueeze(1).expand(batch, width, width)
        return mask.scatter_(2, columns, tree_mask).unsqueeze(1)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        slots: Tensor,
        places: Tensor,
        mask: Tensor,
        span: int,
    ) -> Tensor:
        config = self._config
        batch, width, _ = x.shape
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(batch, width, heads + 2 * kv_heads, config.head_size)
        query, key, value = torch.split(qkv, [heads, kv_heads, kv_heads], dim=2)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = self._norm(query, layer.q_norm), self._norm(key, layer.k_norm)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        keys, values = self._keys[index], self._values[index]
        keys[slots.unsqueeze(1), :, places] = key
        values[slots.unsqueeze(1), :, places] = value
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys[slots, :, :span], values[slots, :, :span], mask, enable_gqa=heads != kv_heads
        )
        return F.linear(mixed.transpose(1, 2).reshape(batch, width, -1), layer.dense, layer.dense_bias)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._config.norm_epsilon)
        return weight * (wide * scale).to(x.dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [B, T, N, D] by its positions; the two halves of a head are the pairs."""
    cosine, sine = rotation
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine


def _mlp(layer: LayerWeights, x: Tensor) -> Tensor:
    gated = F.silu(F.linear(x, layer.activated, layer.activated_bias)) * F.linear(x, layer.linear, layer.linear_bias)
    return F.linear(gated, layer.down, layer.down_bias)
