"""The base model's tensors, read from a TensorRT-LLM checkpoint by its own names.

Hugging Face's files take no part: what runs is what `convert` wrote, with the shards of all ranks joined. The MLP's
matrices have Hugging Face's names in memory; the checkpoint calls gate_proj (the one whose output goes through SiLU)
`mlp.fc`, up_proj `mlp.gate` and down_proj `mlp.proj`, which `_layer` translates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.reader import Checkpoint

_Get = Callable[[str], Tensor]
_GetOptional = Callable[[str], Tensor | None]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. D head size, N heads, I intermediate size; None: the model has no such tensor."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [(N + 2 N_kv) D, H], all queries, then keys, then values
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    dense: Tensor  # [H, N D]
    dense_bias: Tensor | None
    post_norm: Tensor  # [H]
    gate_proj: Tensor  # [I, H]
    gate_proj_bias: Tensor | None
    up_proj: Tensor  # [I, H]
    up_proj_bias: Tensor | None
    down_proj: Tensor  # [H, I]
    down_proj_bias: Tensor | None


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a base model; `head` is the embedding itself if the checkpoint's two copies are equal."""

    embedding: Tensor  # [V, H]
    layers: Sequence[LayerWeights]
    final_norm: Tensor  # [H]
    head: Tensor  # [V, H]


class StreamedLayers(Sequence[LayerWeights]):
    """Layers that are read and cast on every access, so that only one at a time is in memory."""

    def __init__(self, count: int, read: Callable[[int], LayerWeights]) -> None:
        self._count = count
        self._read = read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...

    def __getitem__(self, index: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._read(index)


def load_weights(
    checkpoint: Checkpoint, device: torch.device, *, dtype: torch.dtype | None = None, streamed: bool = False
) -> ModelWeights:
    """Read every base-model tensor, cast to `dtype` where one is given.

    On the CPU, a checkpoint of one rank in its own dtype is memory-mapped, not copied. `streamed` layers are read again
    in every pass.
    """
    names = set(checkpoint.names())

    def get(name: str) -> Tensor:
        return checkpoint.load(name).to(device=device, dtype=dtype)

    def get_optional(name: str) -> Tensor | None:
        return get(name) if name in names else None

    def read(index: int) -> LayerWeights:
        return _layer(f"transformer.layers.{index}.", get, get_optional)

    count = checkpoint.config.num_hidden_layers
    layers = StreamedLayers(count, read) if streamed else tuple(map(read, range(count)))
    embedding = get("transformer.vocab_embedding.weight")
    return ModelWeights(embedding, layers, get("transformer.ln_f.weight"), _head(get_optional, embedding))


def _layer(prefix: str, get: _Get, get_optional: _GetOptional) -> LayerWeights:
    attention, mlp = prefix + "attention.", prefix + "mlp."
    return LayerWeights(
        input_norm=get(prefix + "input_layernorm.weight"),
        qkv=get(attention + "qkv.weight"),
        qkv_bias=get_optional(attention + "qkv.bias"),
        q_norm=get_optional(attention + "q_layernorm.weight"),
        k_norm=get_optional(attention + "k_layernorm.weight"),
        dense=get(attention + "dense.weight"),
        dense_bias=get_optional(attention + "dense.bias"),
        post_norm=get(prefix + "post_layernorm.weight"),
        gate_proj=get(mlp + "fc.weight"),
        gate_proj_bias=get_optional(mlp + "fc.bias"),
        up_proj=get(mlp + "gate.weight"),
        up_proj_bias=get_optional(mlp + "gate.bias"),
        down_proj=get(mlp + "proj.weight"),
        down_proj_bias=get_optional(mlp + "proj.bias"),
    )


def _head(get_optional: _GetOptional, embedding: Tensor) -> Tensor:
    """A tied head is stored twice; using one copy halves what a step reads and what is kept in memory."""
    head = get_optional("lm_head.weight")
    if head is None or torch.equal(head, embedding):
        return embedding
    return head
