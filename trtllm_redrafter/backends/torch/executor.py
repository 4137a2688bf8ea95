"""Interface between the runner and whatever executes the base model: trees in, hidden states and logits out.

Four implementations exist: `transformer.TorchExecutor` (any dtype, CPU and CUDA, plain PyTorch), on a CPU
`native.executor.NativeExecutor` (bfloat16, with a C++ compiler: one call per step, bit-equal rows), on a GPU
`cuda_graphs.GraphExecutor` and `cuda.executor.CudaExecutor`. Each owns a preallocated KV cache of `max_batch_size`
request slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trtllm_redrafter.redrafter.token_tree import Tree

PREFILL_CHUNK = 256
"""Prompt tokens per pass; bounds the activation memory of a long prompt."""


@dataclass(frozen=True)
class TreeOutput:
    """One row per tree node, N in total: the first tree's nodes, then the second's, ..."""

    hidden: Tensor  # [N, H] in the model's dtype, after the final norm
    best: Tensor
    """[N] int64: token of the largest logit (the lowest id on ties) or `NOT_FINITE`. Read it before the next pass."""
    logits: Tensor | None  # [N, V]; only on request


@dataclass(frozen=True)
class PromptOutput:
    """Outputs for a prompt's last token."""

    hidden: Tensor  # [H]
    logits: Tensor  # [V]


class ModelExecutor(Protocol):
    """A base model with its KV cache. A request occupies a slot; `base` is the number of committed positions there."""

    name: str
    detail: str
    """For people: which instructions it uses, or why it was chosen over a faster one."""
    device: str
    row_invariant: bool
    """Are a row's bits independent of the other rows in the batch?"""
    pool: Any
    """Memory pool of its CUDA graphs, which a drafter's graphs share; None: it captures none."""

    def prefill(self, slot: int, token_ids: Sequence[int]) -> PromptOutput:
        """Compute a prompt from position 0 and commit its keys and values."""
        ...

    def prefill_all(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[PromptOutput]:
        """`prefill` of several prompts, short ones together where that changes no bit."""
        ...

    def forward(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, logits: bool) -> TreeOutput:
        """Run B trees in one pass. Node i of a tree is cached at position base + i, uncommitted.

        Greedy decoding needs no `logits`; without them, N rows of a large vocabulary need not be written.
        """
        ...

    def commit(self, slot: int, base: int, path: Sequence[int]) -> None:
        """Commit the nodes of `path` (root first, ascending) as positions base, base + 1, ...; discard the others."""
        ...

    def clear(self, slot: int, first: int, last: int) -> None:
        """Set positions first .. last - 1 of a slot to zero.

        Needed if they hold NaN or infinity, which attention's zero weights for masked positions would turn into NaN.
        """
        ...

    def hidden_states(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        """Like `prefill`, but returns the state of every token: [S, H]."""
        ...

    def undrafted(self) -> ModelExecutor:
        """An executor for decoding without drafting: itself, or a faster one of the same weights with its own cache."""
        ...

    def threads(self) -> AbstractContextManager[None]:
        """Within the block, limit PyTorch's own threads to what a step needs besides this executor's threads."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...
