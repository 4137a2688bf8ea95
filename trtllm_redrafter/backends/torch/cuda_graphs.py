"""The PyTorch executor and the drafter's search as CUDA graphs: one launch per pass instead of a thousand.

A decoding step of a small batch has some twenty kernels per layer of a few microseconds each; launching them one by one
from Python takes several times longer than running them. A graph fixes shapes and addresses, so inputs are copied into
its buffers, trees are padded to one width, and attention reads the cache up to a power of two. Graphs are captured when
a shape first occurs and share one memory pool.

    executor = GraphExecutor(config, weights, GraphLimits(4, 2048, max_nodes=26, max_depth=5), fused=True)
    search = GraphSearch(drafter, embedding, head, shape, executor.pool)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.captured import CapturedGraph, on_device
from trtllm_redrafter.backends.torch.executor import TreeOutput
from trtllm_redrafter.backends.torch.layout import Layout
from trtllm_redrafter.backends.torch.pointwise import EAGER, Pointwise
from trtllm_redrafter.backends.torch.search import PlainSearch
from trtllm_redrafter.backends.torch.transformer import Attend, Rows, TorchExecutor
from trtllm_redrafter.backends.torch.weights import LayerWeights, ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.redrafter.beam_search import Beams, DraftHead
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.sampling import finite_greedy
from trtllm_redrafter.redrafter.token_tree import Tree

_WIDTH = 8
"""Trees are padded to a multiple of this many nodes."""

_FREE_ROWS = 128
"""Up to this many rows take as long as one, since the tensor cores wait for the weights (about 200 on an H200)."""

_SMALLEST_SPAN = 256


@dataclass(frozen=True)
class GraphLimits:
    """Sizes that graphs are captured for. A tree has at most `max_nodes` nodes, none deeper than `max_depth`."""

    max_batch_size: int
    capacity: int
    max_nodes: int
    max_depth: int

    @property
    def width(self) -> int:
        """Number of nodes trees are padded to; 1 without drafting."""
        return 1 if self.max_nodes == 1 else -(-self.max_nodes // _WIDTH) * _WIDTH

    @property
    def fixed_batch(self) -> bool:
        """Is every pass padded to the largest batch? That is free while reading the weights dominates."""
        return self.max_batch_size * self.width <= _FREE_ROWS


class GraphExecutor(TorchExecutor):
    """The passes of `TorchExecutor` as graphs; prompts, and trees beyond the limits, still run without one.

    Matrix products always have the same shape (with `fixed_batch`), and attention is `tree_attention`, so a row's bits
    do not depend on the other rows: drafting changes no greedy text.
    """

    name = "cuda-graphs"

    def __init__(
        self,
        config: CheckpointConfig,
        weights: ModelWeights,
        limits: GraphLimits,
        *,
        fused: bool,
        detail: str = "",
    ) -> None:
        super().__init__(
            config,
            weights,
            max_batch_size=limits.max_batch_size + 1,  # the last slot takes the writes of padding
            capacity=limits.capacity + limits.width,
            detail=detail,
            pointwise=_fused() if fused else EAGER,
        )
        self._limits = limits
        self._fused = fused
        self.row_invariant = fused and limits.fixed_batch
        self._captured: dict[tuple[Layout, int], tuple[CapturedGraph, Tensor]] = {}
        rows = limits.max_batch_size * limits.width
        self._hidden = weights.embedding.new_empty(rows, config.hidden_size)
        self._logits = weights.head.new_empty(rows, weights.head.shape[0])
        self.pool = torch.cuda.graph_pool_handle()

    @torch.no_grad()
    def forward(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, logits: bool) -> TreeOutput:
        limits = self._limits
        end = max(bases) + max(limits.width, *(len(tree) for tree in trees))
        if end > self._capacity:  # a kernel would write into the next slot
            raise ValueError(f"a tree ends at position {end}, the cache at {self._capacity}")
        if max(len(tree) for tree in trees) > limits.width or max(max(t.depths) for t in trees) > limits.max_depth:
            with on_device(self._device):
                return super().forward(slots, bases, trees, logits=logits)
        with on_device(self._device):
            return self._replayed(slots, bases, trees, logits=logits)

    def _replayed(
        self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, logits: bool
    ) -> TreeOutput:
        layout, span = self._layout(len(trees)), self._power_of_two(max(bases))
        values = layout.pack(slots, bases, trees, spare=self._limits.max_batch_size)
        known = self._captured.get((layout, span))
        graph = CapturedGraph(len(values), self._device) if known is None else known[0]
        graph.fill(values)
        if known is None:
            best: Tensor = graph.capture(lambda: self._compute(layout.split(graph.input), layout, span), self.pool)
            self._captured[layout, span] = graph, best
        else:
            best = known[1]
        graph.replay()
        count = sum(len(tree) for tree in trees)
        # Copied out of the buffers, since callers may keep them: contexts outlive the step, `verify` collects logits.
        scores = self._logits[:count].clone() if logits else None
        return TreeOutput(self._hidden[:count].clone(), best[:count], scores)

    def undrafted(self) -> GraphExecutor:
        """For passes of one row per request; in this one they are padded to a tree's width, so that bits agree."""
        limits = replace(self._limits, max_nodes=1, max_depth=0)
        return GraphExecutor(self._config, self._weights, limits, fused=self._fused, detail=self.detail)

    def close(self) -> None:
        self._captured.clear()
        self._hidden = self._logits = torch.empty(0)
        super().close()

    def _chain(self, slot: int, token_ids: Sequence[int]) -> list[Tensor]:
        with on_device(self._device):
            return super()._chain(slot, token_ids)

    def _power_of_two(self, base: int) -> int:
        needed = base + self._limits.width
        return min(self._capacity, max(_SMALLEST_SPAN, 1 << (needed - 1).bit_length()))

    def _layout(self, trees: int) -> Layout:
        limits = self._limits
        batch = limits.max_batch_size if limits.fixed_batch else trees
        return Layout(batch * limits.width, batch, limits.width, limits.max_depth + 1, padded=True)

    def _compute(self, parts: Mapping[str, Tensor], layout: Layout, span: int) -> Tensor:
        """What is captured: rows of real nodes come first in `_hidden`, `_logits` and the tokens that are returned."""
        tokens, depths = (parts[name].view(layout.batch, layout.nodes) for name in ("tokens", "depths"))
        paths = parts["paths"].view(layout.batch, layout.nodes, layout.path)
        attend = (self._walking if self._fused else self._through_mask)(
            parts["slots"], parts["bases"], depths, paths, span
        )
        hidden, rows = self._layers(tokens, attend).flatten(0, 1), layout.rows
        hidden = torch.index_select(hidden, 0, parts["real"], out=self._hidden[:rows])
        return finite_greedy(torch.mm(hidden, self._weights.head.t(), out=self._logits[:rows]))

    def _through_mask(self, slots: Tensor, bases: Tensor, depths: Tensor, paths: Tensor, span: int) -> Attend:
        """PyTorch's attention. A node attends to its path and itself; padding only to itself."""
        batch, width = depths.shape
        mask = torch.eye(width, dtype=torch.bool, device=depths.device).repeat(batch, 1, 1)
        own = torch.arange(width, device=depths.device).view(1, -1, 1)
        mask = mask.scatter(2, torch.where(paths < 0, own, paths), torch.ones_like(paths, dtype=torch.bool))
        return self._masked(Rows(slots, bases, depths, mask), span)

    def _walking(self, slots: Tensor, bases: Tensor, depths: Tensor, paths: Tensor, span: int) -> Attend:
        """Our attention kernel, which sums in the order of each row's own sequence."""
        from trtllm_redrafter.backends.torch.tree_attention import Heads, TreeRows, attend

        config = self._config
        sizes = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_size, config.norm_epsilon)
        rows = TreeRows(slots, bases, depths, paths)

        def walk(index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
            norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
            cache, rotary = (self._keys[index], self._values[index]), (self._cosine, self._sine)
            return attend(qkv.flatten(0, 1), norms, rotary, cache, rows, sizes, span).view(*qkv.shape[:2], -1)

        return walk


def _fused() -> Pointwise:
    from trtllm_redrafter.backends.torch.fused import FUSED  # needs Triton, which comes with PyTorch for CUDA only

    return FUSED


class GraphSearch(PlainSearch):
    """`beam_search` as one graph per batch size. Returns lists, since trees are merged on the host."""

    def __init__(self, drafter: Drafter, embedding: Tensor, head: DraftHead, shape: DraftShape, pool: Any) -> None:
        super().__init__(drafter, embedding, head, shape)
        self._pool = pool
        self._captured: dict[int, tuple[CapturedGraph, Tensor, Tensor]] = {}

    @torch.no_grad()
    def search(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> tuple[list[list[list[int]]], list[bool]]:
        with on_device(self._embedding.device):
            return self._search(contexts, roots)

    def _search(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> tuple[list[list[list[int]]], list[bool]]:
        batch = len(roots)
        known = self._captured.get(batch)
        if known is None:
            graph = CapturedGraph(batch, self._embedding.device)
            context = torch.stack(list(contexts))
            graph.fill(roots)
            outputs = graph.capture(lambda: self._compute(graph.input, context), self._pool)
            self._captured[batch] = graph, context, outputs
        else:
            graph, context, outputs = known
            torch.stack(list(contexts), out=context)
            graph.fill(roots)
        graph.replay()
        *tokens, missed = outputs.tolist()
        if missed:
            beams = self.beams(context, roots)
            tokens = self._flat(beams).tolist()
        finite, tokens = [bool(flag) for flag in tokens[-batch:]], tokens[:-batch]
        rows, length = self.shape.num_beams, self.shape.draft_len + 1
        cut = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        return [cut[start : start + rows] for start in range(0, len(cut), rows)], finite

    def _compute(self, roots: Tensor, context: Tensor) -> Tensor:
        """`_flat`, then whether a tie at the cut was missed: [B K (L + 1) + B + 1]."""
        missed: list[Tensor] = []
        beams = self._run(roots, context, missed)
        flag = torch.stack(missed).any() if missed else torch.zeros((), dtype=torch.bool, device=context.device)
        return torch.cat([self._flat(beams), flag.to(torch.int64).view(1)])

    @staticmethod
    def _flat(beams: Beams) -> Tensor:
        """All beams in one row, then whether each sequence's scores are finite: [B K (L + 1) + B]."""
        return torch.cat([beams.tokens.flatten(), beams.finite.to(beams.tokens)])
