"""The base model's passes as graphs of our CUDA kernels: bits of a row do not depend on what is computed beside it.

A graph is captured for a number of rows (rounded up), a batch size and a power of two of cache positions when they first
occur; then a pass is one copy of integers and one launch. Prompts run through PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.captured import CapturedGraph, on_device
from trtllm_redrafter.backends.torch.cuda.base_pass import MAX_ROWS, BasePass, Layout, stacked
from trtllm_redrafter.backends.torch.executor import TreeOutput
from trtllm_redrafter.backends.torch.pointwise import Pointwise
from trtllm_redrafter.backends.torch.transformer import TorchExecutor
from trtllm_redrafter.backends.torch.weights import ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.redrafter.token_tree import Tree

_SMALLEST_SPAN = 256


class CudaExecutor(TorchExecutor):
    """Trees of at most `max_nodes` nodes, none deeper than `max_depth`, run through the kernels."""

    name = "cuda"
    row_invariant = True

    def __init__(
        self,
        config: CheckpointConfig,
        weights: ModelWeights,
        *,
        max_batch_size: int,
        capacity: int,
        max_nodes: int,
        max_depth: int,
        pointwise: Pointwise,
        detail: str = "",
    ) -> None:
        weights = stacked(weights)
        super().__init__(
            config, weights, max_batch_size=max_batch_size, capacity=capacity + max_nodes, detail=detail,
            pointwise=pointwise,
        )  # fmt: skip
        self._nodes, self._depth = max_nodes, max_depth
        rows = min(MAX_ROWS, max_batch_size * max_nodes)
        self._model = BasePass(
            config, weights, (self._keys, self._values), (self._cosine, self._sine),
            max_rows=_round_up(rows), path=max_depth + 1,
        )  # fmt: skip
        self._graphs: dict[tuple[Layout, int], CapturedGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    @torch.no_grad()
    def forward(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, logits: bool) -> TreeOutput:
        largest, deepest = max(len(tree) for tree in trees), max(max(tree.depths) for tree in trees)
        end = max(bases) + largest
        if end > self._capacity:  # a kernel would write into the next slot
            raise ValueError(f"a tree ends at position {end}, the cache at {self._capacity}")
        with on_device(self._device):
            if largest > self._nodes or deepest > self._depth:
                return super().forward(slots, bases, trees, logits=logits)
            return _joined([self._pass(slots[a:b], bases[a:b], trees[a:b], logits) for a, b in _portions(trees)])

    def _pass(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], logits: bool) -> TreeOutput:
        count = sum(len(tree) for tree in trees)
        layout = Layout(_round_up(count), _batch(len(trees)), self._depth + 1, self._nodes)
        span = min(self._capacity, max(_SMALLEST_SPAN, 1 << (max(bases) - 1).bit_length()))
        values = layout.pack(slots, bases, trees)
        graph = self._graphs.get((layout, span))
        if graph is None:
            graph = CapturedGraph(len(values), self._device)
            graph.fill(values)
            packed = graph.input
            graph.capture(lambda: self._model.launch(packed, layout, span), self.pool)
            self._graphs[layout, span] = graph
        else:
            graph.fill(values)
        graph.replay()
        model = self._model
        scores = model.logits[:count].clone() if logits else None
        return TreeOutput(model.hidden[:count].clone(), model.best[:count].clone(), scores)

    def close(self) -> None:
        self._graphs.clear()
        del self._model
        super().close()


def _round_up(rows: int) -> int:
    """Rows a graph is made for: exact up to 2, then multiples of 8."""
    return rows if rows <= 2 else min(MAX_ROWS, -(-rows // 8) * 8)


def _batch(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _portions(trees: Sequence[Tree]) -> list[tuple[int, int]]:
    """Which trees go together, so that no pass has more than `MAX_ROWS` rows."""
    found, start, rows = [], 0, 0
    for number, tree in enumerate(trees):
        if rows + len(tree) > MAX_ROWS:
            found.append((start, number))
            start, rows = number, 0
        rows += len(tree)
    return [*found, (start, len(trees))]


def _joined(outputs: list[TreeOutput]) -> TreeOutput:
    """The passes' outputs as one."""
    if len(outputs) == 1:
        return outputs[0]

    def cat(parts: list[Any]) -> Tensor:
        return torch.cat(parts)

    scores = None if outputs[0].logits is None else cat([o.logits for o in outputs])
    return TreeOutput(cat([o.hidden for o in outputs]), cat([o.best for o in outputs]), scores)
