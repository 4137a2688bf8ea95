"""Bytes of a model's weights per rank and of its KV cache per token, from the checkpoint's tensor table.

The table that defines a checkpoint's layout also gives its size, so there are no formulas per model family.

    weights = weight_bytes(config)        # of the largest rank
    weights.base, weights.drafter
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.layout import TensorSpec, rank_slice, tensor_specs
from trtllm_redrafter.checkpoint.names import DRAFTER, EMBEDDING, LM_HEAD

STORED_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
_UNKNOWN_SCHEME_BYTES: Mapping[str, float] = {"W8A16": 1, "W4A16": 0.5, "MIXED_PRECISION": 1}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes on one rank. The embedding is stored but read row by row; a decoding step reads `streamed` bytes."""

    base: int
    embedding: int
    drafter: int
    draft_head: int
    """Part of `drafter`: its LM head."""

    @property
    def total(self) -> int:
        return self.base + self.embedding + self.drafter

    @property
    def streamed(self) -> int:
        return self.base


def dtype_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def weight_bytes(config: CheckpointConfig) -> WeightBytes:
    """Rank 0's share; ranks are equal but for padding."""
    base = embedding = drafter = draft_head = 0
    tied = config.tie_word_embeddings and config.tp_size == 1  # the builder then keeps one copy
    for name, spec in tensor_specs(config).items():
        if spec.optional and name.startswith("transformer.layers."):
            continue  # optional scales: a few bytes
        size = _rank_bytes(spec, config)
        if name.startswith(DRAFTER):
            drafter += size
            draft_head += size if name == DRAFTER + LM_HEAD else 0
        elif name == EMBEDDING:
            embedding += 0 if tied else size
        else:
            base += size
    return WeightBytes(base, embedding, drafter, draft_head)


def _rank_bytes(spec: TensorSpec, config: CheckpointConfig) -> int:
    count = math.prod(rank_slice(spec, config, 0).shape(spec.shape))
    each: float = STORED_BYTES.get(spec.dtype, 4)
    if not spec.checked:
        each = _UNKNOWN_SCHEME_BYTES.get(config.quant_algo or "", each)
    return math.ceil(count * each)


def kv_bytes_per_token(config: CheckpointConfig) -> int:
    """Keys and values of all layers on one rank; KV heads are repeated if there are fewer than ranks."""
    heads = -(-config.num_key_value_heads // config.tp_size)
    each = {"FP8": 1, "INT8": 1}.get(config.kv_cache_quant_algo or "", dtype_bytes(config.dtype))
    return 2 * config.num_hidden_layers * heads * config.head_size * each


def base_parameters(config: CheckpointConfig) -> int:
    """Parameters multiplied with every token, over all ranks: layers and LM head, without embedding and norms."""
    h, d = config.hidden_size, config.head_size
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    layer = h * (q + 2 * kv) + q * h + 3 * h * config.intermediate_size
    return config.num_hidden_layers * layer + config.padded_vocab_size * h


def drafter_parameters(config: CheckpointConfig) -> int:
    """Parameters multiplied with every drafted position."""
    if config.drafter is None:
        return 0
    return sum(math.prod(shape) for shape in config.drafter.parameter_shapes().values() if len(shape) == 2)
