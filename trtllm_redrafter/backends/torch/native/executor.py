"""The base model through the compiled kernels: bfloat16 on a CPU, one call per step.

Weights are packed once at load (the memory-mapped originals are let go of), the KV cache lives on the C++ side. A
row's bits do not depend on the rows beside it, so drafting and autoregression agree token for token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trtllm_redrafter.backends.torch.executor import PREFILL_CHUNK, PromptOutput, TreeOutput
from trtllm_redrafter.backends.torch.native.library import (
    ModelConfig,
    NativeUnavailable,
    load_library,
    usable_cores,
)
from trtllm_redrafter.backends.torch.rope import rotary_tables
from trtllm_redrafter.backends.torch.weights import LayerWeights, ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.redrafter.token_tree import Tree

LANES = 16
_ROW = np.dtype(
    [("token", "i4"), ("slot", "i4"), ("base", "i4"), ("depth", "i4"), ("node", "i4"), ("path", "u8")], align=True
)


def unsupported_reason(config: CheckpointConfig, weights: ModelWeights) -> str | None:
    """Why the kernels cannot execute this model, or None."""
    reference = weights.embedding
    if reference.device.type != "cpu" or reference.dtype != torch.bfloat16:
        return f"the kernels compute bfloat16 on a CPU, not {reference.dtype} on {reference.device}"
    layer = weights.layers[0]
    if layer.activated_bias is not None or layer.down_bias is not None:
        return "the kernels have no MLP biases"
    sizes = (config.hidden_size, config.head_size, config.intermediate_size)
    if any(size % LANES for size in sizes):
        return f"hidden, head and intermediate size {sizes} must be multiples of {LANES}"
    return None


class Packer:
    """Packs matrices for the kernels and keeps every array alive that C++ points to."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._alive: list[Tensor] = []

    def matrix(self, weight: Tensor) -> int:
        """Address of [n, k] in the kernels' layout."""
        weight = weight.detach().to(torch.bfloat16).contiguous()
        rows, columns = weight.shape
        packed = torch.empty(-(-rows // LANES) * LANES * columns, dtype=torch.bfloat16)
        self._library.redrafter_pack(weight.data_ptr(), rows, columns, packed.data_ptr())
        return self._keep(packed)

    def vector(self, values: Tensor | None) -> int | None:
        """Address of bf16 values as they are; None stays None."""
        return None if values is None else self._keep(values.detach().to(torch.bfloat16).clone())

    def floats(self, values: Tensor | None) -> int | None:
        """Address of float32 values; None stays None."""
        return None if values is None else self._keep(values.detach().float().clone().contiguous())

    def _keep(self, values: Tensor) -> int:
        self._alive.append(values)
        return values.data_ptr()


class NativeExecutor:
    """Base model plus KV cache behind the C interface of kernels.cpp."""

    name = "native"
    device = "cpu"
    row_invariant = True

    def __init__(
        self, config: CheckpointConfig, weights: ModelWeights, *, max_batch_size: int, capacity: int, max_rows: int
    ) -> None:
        reason = unsupported_reason(config, weights)
        if reason:
            raise NativeUnavailable(reason)
        self.library = load_library()
        self.detail = self.library.redrafter_isa().decode()
        self._config = config
        self._packer = Packer(self.library)
        positions = -(-capacity // LANES) * LANES
        native = ModelConfig(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=config.head_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            vocab=weights.head.shape[0],
            max_slots=max_batch_size,
            max_seq=positions,
            max_rows=max(max_rows, PREFILL_CHUNK),
            threads=usable_cores(),
            epsilon=config.norm_epsilon,
        )
        self.handle: int | None = self.library.redrafter_create(ctypes.byref(native))
        if not self.handle:
            raise NativeUnavailable("no memory for the KV cache")
        self._set_weights(weights, positions)

    def _set_weights(self, weights: ModelWeights, positions: int) -> None:
        config, packer = self._config, self._packer
        for index, layer in enumerate(weights.layers):
            self._set_layer(index, layer)
        cosine, sine = rotary_tables(config.head_size, config.rotary_base, config.rotary_scaling, positions)
        self._embedding = weights.embedding
        self.library.redrafter_set_ends(
            self.handle,
            weights.embedding.data_ptr(),
            packer.vector(weights.final_norm),
            packer.matrix(weights.head),
            packer.floats(cosine),
            packer.floats(sine),
        )

    def _set_layer(self, index: int, layer: LayerWeights) -> None:
        packer = self._packer
        self.library.redrafter_set_layer(
            self.handle,
            index,
            *(packer.matrix(m) for m in (layer.qkv, layer.dense, layer.activated, layer.linear, layer.down)),
            *(packer.vector(v) for v in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)),
            packer.floats(layer.qkv_bias),
            packer.floats(layer.dense_bias),
        )

    def prefill(self, slot: int, token_ids: Sequence[int]) -> PromptOutput:
        hidden, logits = torch.empty(0), None
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            rows = self._chain_rows(slot, start, token_ids[start : start + PREFILL_CHUNK])
            ends = start + PREFILL_CHUNK >= len(token_ids)
            wanted = np.array([len(rows) - 1] if ends else [], dtype=np.int32)
            hidden, _, logits = self._call(rows, wanted, logits=True)
        assert logits is not None
        return PromptOutput(hidden[-1], logits[-1])

    def hidden_states(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        states = []
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            rows = self._chain_rows(slot, start, token_ids[start : start + PREFILL_CHUNK])
            states.append(self._call(rows, np.array([], dtype=np.int32), logits=False)[0])
        return torch.cat(states)

    def forward(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, logits: bool) -> TreeOutput:
        sizes = [len(tree) for tree in trees]
        rows = np.zeros(sum(sizes), dtype=_ROW)
        rows["token"] = [token for tree in trees for token in tree.tokens]
        rows["slot"] = np.repeat(np.asarray(slots, dtype=np.int32), sizes)
        rows["base"] = np.repeat(np.asarray(bases, dtype=np.int32), sizes)
        rows["depth"] = depths = [depth for tree in trees for depth in tree.depths]
        rows["node"] = [node for size in sizes for node in range(size)]
        paths = np.full((len(rows), max(depths) + 1), -1, dtype=np.int32)
        for row, path in enumerate(path for tree in trees for path in tree.paths()):
            if path[-1] != len(path) - 1:  # else every ancestor lies where its depth says, and is read in place
                paths[row, : len(path)] = path
                rows["path"][row] = paths.ctypes.data + row * paths.strides[0]
        hidden, best, scores = self._call(rows, np.arange(len(rows), dtype=np.int32), logits=logits)
        return TreeOutput(hidden, best, scores)

    def commit(self, slot: int, base: int, path: Sequence[int]) -> None:
        if any(node != place for place, node in enumerate(path)):
            nodes = np.asarray(path, dtype=np.int32)
            self.library.redrafter_commit(self.handle, slot, base, nodes.ctypes.data, len(nodes))

    def close(self) -> None:
        if self.handle:
            self.library.redrafter_destroy(self.handle)
        self.handle = None

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.close()

    def _chain_rows(self, slot: int, start: int, token_ids: Sequence[int]) -> NDArray[np.void]:
        rows = np.zeros(len(token_ids), dtype=_ROW)
        rows["token"] = token_ids
        rows["slot"] = slot
        rows["base"] = start
        rows["depth"] = rows["node"] = np.arange(len(token_ids))
        return rows

    def _call(
        self, rows: NDArray[np.void], logit_rows: NDArray[np.int32], *, logits: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = torch.empty(len(rows), self._config.hidden_size, dtype=torch.bfloat16)
        best = torch.empty(len(logit_rows), dtype=torch.int64)
        scores = torch.empty(len(logit_rows), self._config.vocab_size) if logits else None
        self.library.redrafter_forward(
            self.handle,
            rows.ctypes.data,
            len(rows),
            hidden.data_ptr(),
            logit_rows.ctypes.data,
            len(logit_rows),
            None if scores is None else scores.data_ptr(),
            best.data_ptr(),
        )
        return hidden, best, scores
