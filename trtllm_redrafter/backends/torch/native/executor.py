"""The base model through the compiled kernels: bfloat16 on a CPU, one call per step.

Weights are packed once at load (the memory-mapped originals are released), and the KV cache is on the C++ side. A
row's bits do not depend on the rows beside it, so drafting and autoregression agree token for token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trtllm_redrafter.backends.torch.executor import PREFILL_CHUNK, PromptOutput, TreeOutput
from trtllm_redrafter.backends.torch.native.compiled import NativeUnavailable
from trtllm_redrafter.backends.torch.native.interface import (
    CommitArguments,
    EndArguments,
    LayerArguments,
    ModelConfig,
    StepArguments,
    call,
)
from trtllm_redrafter.backends.torch.native.library import load_library, usable_cores
from trtllm_redrafter.backends.torch.native.packing import LANES, Packer, check_shapes, unsupported_reason
from trtllm_redrafter.backends.torch.rope import rotary_tables
from trtllm_redrafter.backends.torch.weights import LayerWeights, ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.redrafter.token_tree import Tree

_ROW = np.dtype([(name, "i4") for name in ("token", "slot", "base", "depth", "node", "path")])
"""`RedrafterRow`; path -1: every ancestor lies where its depth says."""


class NativeExecutor:
    """Base model plus KV cache behind the C interface of kernels/kernels.cpp."""

    name = "native"
    device = "cpu"
    row_invariant = True
    pool = None

    def __init__(
        self, config: CheckpointConfig, weights: ModelWeights, *, max_batch_size: int, capacity: int, max_rows: int
    ) -> None:
        reason = unsupported_reason(config, weights)
        if reason:
            raise NativeUnavailable(reason)
        self.library = load_library()
        check_shapes(config, weights)
        self.detail = self.library.redrafter_isa().decode()
        self.hidden_size = config.hidden_size
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
        handle = ctypes.c_void_p()
        call(self.library.redrafter_create, native, handle)
        self.handle: int | None = handle.value
        self._set_weights(weights, positions)

    def _set_weights(self, weights: ModelWeights, positions: int) -> None:
        config, packer = self._config, self._packer
        for index, layer in enumerate(weights.layers):
            call(self.library.redrafter_set_layer, self.handle, index, self._layer(layer))
        cosine, sine = rotary_tables(config.head_size, config.rotary_base, config.rotary_scaling, positions)
        ends = EndArguments(
            embedding=packer.keep(weights.embedding.contiguous()),
            final_norm=packer.vector(weights.final_norm),
            head=packer.matrix(weights.head),
            cosine=packer.floats(cosine),
            sine=packer.floats(sine),
        )
        call(self.library.redrafter_set_ends, self.handle, ends)

    def _layer(self, layer: LayerWeights) -> Any:
        packer = self._packer
        return LayerArguments(
            qkv=packer.matrix(layer.qkv),
            dense=packer.matrix(layer.dense),
            gate=packer.matrix(layer.gate_proj),
            up=packer.matrix(layer.up_proj),
            down=packer.matrix(layer.down_proj),
            input_norm=packer.vector(layer.input_norm),
            post_norm=packer.vector(layer.post_norm),
            q_norm=packer.vector(layer.q_norm),
            k_norm=packer.vector(layer.k_norm),
            qkv_bias=packer.floats(layer.qkv_bias),
            dense_bias=packer.floats(layer.dense_bias),
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

    def prefill_all(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[PromptOutput]:
        return [self.prefill(slot, prompt) for slot, prompt in zip(slots, prompts, strict=True)]

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
        rows["path"] = -1
        paths = np.full((len(rows), max(depths) + 1), -1, dtype=np.int32)
        for row, path in enumerate(path for tree in trees for path in tree.paths()):
            if path[-1] != len(path) - 1:  # else every ancestor lies where its depth says, and is read in place
                paths[row, : len(path)] = path
                rows["path"][row] = row
        hidden, best, scores = self._call(rows, np.arange(len(rows), dtype=np.int32), logits=logits, paths=paths)
        return TreeOutput(hidden, best, scores)

    def commit(self, slot: int, base: int, path: Sequence[int]) -> None:
        if any(node != place for place, node in enumerate(path)):
            nodes = np.asarray(path, dtype=np.int32)
            kept = CommitArguments(path=nodes.ctypes.data, slot=slot, base=base, count=len(nodes))
            call(self.library.redrafter_commit, self.handle, kept)

    def clear(self, slot: int, first: int, last: int) -> None:
        call(self.library.redrafter_clear, self.handle, slot, first, last)

    def undrafted(self) -> NativeExecutor:
        return self

    @contextmanager
    def threads(self) -> Iterator[None]:
        """PyTorch's operations are small beside the kernels: a second OpenMP thread costs more than it brings."""
        before = torch.get_num_threads()
        if before > 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if before > 1:
                torch.set_num_threads(before)

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
        rows["path"] = -1
        return rows

    def _call(
        self,
        rows: NDArray[np.void],
        logit_rows: NDArray[np.int32],
        *,
        logits: bool,
        paths: NDArray[np.int32] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = torch.empty(len(rows), self._config.hidden_size, dtype=torch.bfloat16)
        best = torch.empty(len(logit_rows), dtype=torch.int64)
        scores = torch.empty(len(logit_rows), self._config.vocab_size) if logits else None
        step = StepArguments(
            rows=rows.ctypes.data,
            count=len(rows),
            logit_rows=logit_rows.ctypes.data,
            logit_count=len(logit_rows),
            hidden=hidden.data_ptr(),
            logits=None if scores is None else scores.data_ptr(),
            best=best.data_ptr(),
        )
        if paths is not None:
            step.paths, (step.path_count, step.path_width) = paths.ctypes.data, paths.shape
        call(self.library.redrafter_forward, self.handle, step)
        return hidden, best, scores
