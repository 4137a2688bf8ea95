"""The base model's passes as graphs of our CUDA kernels: bits of a row do not depend on what is computed beside it.

A graph is captured for a number of rows (rounded up), a batch size and a power of two of cache positions when they
first occur; then a pass is one copy of integers and one launch. Prompts go through the same kernels, in pieces of up to
256 tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.captured import CapturedGraph, on_device
from trtllm_redrafter.backends.torch.cuda.base_pass import MAX_ROWS, SEGMENT, BasePass, tail_blocks, unsupported
from trtllm_redrafter.backends.torch.cuda.compiler import unavailable
from trtllm_redrafter.backends.torch.cuda.linear import padded
from trtllm_redrafter.backends.torch.executor import PromptOutput, TreeOutput
from trtllm_redrafter.backends.torch.layout import Layout
from trtllm_redrafter.backends.torch.transformer import TorchExecutor
from trtllm_redrafter.backends.torch.weights import ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.redrafter.token_tree import Tree

SWITCH = "TRTLLM_REDRAFTER_HOPPER_KERNELS"
"""Environment variable; 0 leaves these kernels out."""

_SMALLEST_SPAN = 256
_PATH_STEP = 8
_PIECE_STEP = 32  # kernels are compiled for lengths of prompts' pieces in such steps
_PART_BYTES = 256 << 20
"""Partial results of attention that a piece of a prompt may take."""


@dataclass(frozen=True)
class _Key:
    """What a graph is captured for; `head`: are logits computed?"""

    layout: Layout
    span: int
    head: bool


def cuda_unavailable(config: CheckpointConfig, weights: ModelWeights, max_nodes: int) -> str | None:
    """Why `CudaExecutor` cannot be used for a model on its GPU, or None."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if torch.cuda.get_device_capability(weights.embedding.device)[0] != 9:
        return "the CUDA kernels are written for Hopper GPUs (compute capability 9.0)"
    if max_nodes > MAX_ROWS:
        return f"trees have {max_nodes} nodes, more than {MAX_ROWS}"
    return unsupported(config, weights) or unavailable()


class CudaExecutor(TorchExecutor):
    """Passes of up to 256 rows; more trees than fit one pass take several."""

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
        detail: str = "",
    ) -> None:
        """`max_nodes`: of a tree, usually; at most 256."""
        super().__init__(
            config, weights, max_batch_size=max_batch_size, capacity=capacity + max_nodes, detail=detail
        )  # fmt: skip
        with on_device(self._device):
            self.model = BasePass(
                config, weights, (self._keys, self._values), (self._cosine, self._sine),
                max_rows=MAX_ROWS, logits_rows=MAX_ROWS,
            )  # fmt: skip
            self._weights = self.model.weights
            self._last = weights.embedding.new_zeros(MAX_ROWS, config.hidden_size)
            self._graphs: dict[_Key | int, CapturedGraph] = {}  # passes, and heads of so many rows
            self.pool = torch.cuda.graph_pool_handle()

    def prefill(self, slot: int, token_ids: Sequence[int]) -> PromptOutput:
        return self.prefill_all([slot], [token_ids])[0]

    @torch.no_grad()
    def prefill_all(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[PromptOutput]:
        """Short prompts share a pass."""
        found = []
        with on_device(self._device):
            for begin, end in portions([len(prompt) for prompt in prompts]):
                last = self._last_states(slots[begin:end], prompts[begin:end])
                count = len(last)
                self._last[:count].copy_(last)
                rows = _round_up(count)
                self._replay(rows, [0], partial(self._head, rows))
                logits = self.model.logits[:count].clone()
                found += [PromptOutput(*output) for output in zip(last, logits, strict=True)]
        return found

    @torch.no_grad()
    def forward(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, logits: bool) -> TreeOutput:
        sizes = [len(tree) for tree in trees]
        end = max(bases) + max(sizes)
        if end > self._capacity:  # a kernel would write into the next slot
            raise ValueError(f"a tree ends at position {end}, the cache at {self._capacity}")
        with on_device(self._device):
            return _joined([self._pass(slots[a:b], bases[a:b], trees[a:b], logits) for a, b in portions(sizes)])

    def close(self) -> None:
        self._graphs.clear()
        del self.model
        super().close()

    def _pass(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], logits: bool) -> TreeOutput:
        count, nodes = sum(len(tree) for tree in trees), max(len(tree) for tree in trees)
        deepest = max(max(tree.depths) for tree in trees)
        layout = tree_layout(count, power_of_two(len(trees)), nodes, deepest)
        model, key = self.model, _Key(layout, self.span(max(bases)), head=True)

        def launch(packed: Tensor) -> None:
            model.launch(packed, layout, key.span)
            model.launch_head(model.hidden, layout.rows)

        self._replay(key, layout.pack(slots, bases, trees), launch)
        scores = model.logits[:count].clone() if logits else None
        return TreeOutput(model.hidden[:count].clone(), model.best[:count].clone(), scores)

    def _head(self, rows: int, packed: Tensor) -> None:
        del packed  # a graph of the head has no input of its own
        self.model.launch_head(self._last, rows)

    def _last_states(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """State [B, H] of each prompt's last token; one prompt, or several that fit a pass."""
        if len(prompts) == 1:
            return self._chain(slots[0], prompts[0])[-1][-1:]
        ends = list(accumulate(len(prompt) for prompt in prompts))
        return self._chains(slots, 0, prompts)[[end - 1 for end in ends]]

    @torch.no_grad()
    def _chain(self, slot: int, token_ids: Sequence[int]) -> list[Tensor]:
        """Hidden states [n, H] of a prompt, piece by piece."""
        states, start = [], 0
        while start < len(token_ids):
            piece = token_ids[start : start + self._piece(self.span(start))]
            states.append(self._chains([slot], start, [piece]))
            start += len(piece)
        return states

    def _chains(self, slots: Sequence[int], start: int, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states [N, H] of pieces of prompts that begin at the position `start`, in one pass."""
        count, longest = sum(map(len, pieces)), -(-max(map(len, pieces)) // _PIECE_STEP) * _PIECE_STEP
        layout = Layout(padded(count), power_of_two(len(pieces)), longest, longest, chain=True)
        trees = [Tree(list(piece), list(range(-1, len(piece) - 1)), list(range(len(piece)))) for piece in pieces]
        key = _Key(layout, self.span(start), head=False)
        values = layout.pack(slots, [start] * len(pieces), trees)
        self._replay(key, values, partial(self.model.launch, layout=layout, span=key.span))
        return self.model.hidden[:count].clone()

    def _replay(self, key: _Key | int, values: list[int], launch: Callable[[Tensor], None]) -> None:
        """Run what `launch` queues on these integers, captured when the key first occurs."""
        graph = self._graphs.get(key)
        if graph is None:
            graph = CapturedGraph(len(values), self._device)
            graph.fill(values)
            packed = graph.input
            graph.capture(lambda: launch(packed), self.pool)
            self._graphs[key] = graph
        else:
            graph.fill(values)
        graph.replay()

    @property
    def cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, slots, KV heads, capacity, D]."""
        return self._keys, self._values

    def span(self, base: int) -> int:
        """Committed positions that a graph for `base` of them is captured for."""
        return min(self._capacity, max(_SMALLEST_SPAN, power_of_two(base)))

    def _piece(self, span: int) -> int:
        """Prompt tokens of a pass that follows `span` positions, so that partial results stay small."""
        config = self._config
        row = (-(-span // SEGMENT) + tail_blocks(MAX_ROWS)) * config.num_attention_heads * config.head_size * 4
        return max(16, min(MAX_ROWS, _PART_BYTES // row // 16 * 16))


def tree_layout(rows: int, batch: int, nodes: int, depth: int) -> Layout:
    """The layout of a graph for trees of up to `nodes` nodes and this depth, `rows` rows together."""
    return Layout(_round_up(rows), batch, _round_up(nodes), -(-(depth + 1) // _PATH_STEP) * _PATH_STEP)


def _round_up(rows: int) -> int:
    """Rows that a graph is made for: exact up to 2, then multiples of 8."""
    return rows if rows <= 2 else min(MAX_ROWS, -(-rows // 8) * 8)


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


def portions(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Which of so many rows each go together, so that no pass has more than `MAX_ROWS`; what has more is alone."""
    found, start, rows = [], 0, 0
    for number, size in enumerate(sizes):
        if number > start and rows + size > MAX_ROWS:
            found.append((start, number))
            start, rows = number, 0
        rows += size
    return [*found, (start, len(sizes))]


def _joined(outputs: Sequence[TreeOutput]) -> TreeOutput:
    """The passes' outputs as one."""
    if len(outputs) == 1:
        return outputs[0]
    scores = [output.logits for output in outputs if output.logits is not None]
    return TreeOutput(
        torch.cat([output.hidden for output in outputs]),
        torch.cat([output.best for output in outputs]),
        torch.cat(scores) if scores else None,
    )
