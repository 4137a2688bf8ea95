"""From an engine's drafter to token trees.

The LM head may be cut to the vocabulary's most frequent rows (`draft_vocab.safetensors`, written by the trainer):
at batch 1 a 49,152-row head costs more than the rest of the drafter. This changes what is drafted, so it can
change the acceptance length, and never the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from trtllm_redrafter.backends.torch.cuda.executor import CudaExecutor
from trtllm_redrafter.backends.torch.cuda.search import SearchKernel
from trtllm_redrafter.backends.torch.cuda_graphs import GraphExecutor, GraphSearch
from trtllm_redrafter.backends.torch.executor import Executor
from trtllm_redrafter.backends.torch.low_rank import LowRankHead
from trtllm_redrafter.backends.torch.native.drafter import NativeDrafter
from trtllm_redrafter.backends.torch.native.executor import NativeExecutor
from trtllm_redrafter.checkpoint.draft_vocab import DRAFT_VOCAB_FILE, read_draft_vocab
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import NumericalError, not_finite
from trtllm_redrafter.redrafter.beam_search import Beams, DraftHead, beam_search, draft_head
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.token_tree import Tree

_PREFIX = "drafter."


def load_drafter(checkpoint: Checkpoint, config: DrafterConfig, device: torch.device) -> Drafter:
    """The checkpoint's drafter as a module, its parameters memory-mapped where the checkpoint is."""
    with torch.device("meta"):
        drafter = Drafter(config)
    for name, _ in list(drafter.named_parameters()):
        owner = drafter.get_submodule(name.rpartition(".")[0])
        tensor = checkpoint.load(_PREFIX + name).to(device)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    return drafter.eval()


def frequent_rows(folder: Path, count: int, vocab_size: int) -> Tensor | None:
    """The `count` most frequent token ids, if the checkpoint names them."""
    file = folder / DRAFT_VOCAB_FILE
    return read_draft_vocab(file, vocab_size)[:count] if count > 0 and file.exists() else None


def _factored(head: DraftHead, low_rank: LowRankHead) -> DraftHead:
    """The same head as the base model's rows times a small matrix, which is less to read."""
    base = low_rank.base_head if head.rows is None else low_rank.base_head[head.rows].contiguous()
    return replace(head, weight=base, factor=low_rank.factor.to(base.device))


class Drafting:
    """Proposes one tree per sequence: its root alone where the drafter's numbers are not finite."""

    error: NumericalError | None = None
    """Set once that has happened."""

    def __init__(
        self,
        drafter: Drafter,
        executor: Executor,
        embedding: Tensor,
        shape: DraftShape,
        *,
        rows: Tensor | None,
        max_batch_size: int,
        low_rank: LowRankHead | None,
    ) -> None:
        self.shape = shape
        self._dtype = embedding.dtype
        self._native: NativeDrafter | None = None
        self._graphs: GraphSearch | SearchKernel | None = None
        if isinstance(executor, NativeExecutor) and NativeDrafter.supports(drafter, rows):
            rows = None if rows is None else rows.sort().values
            self._native = NativeDrafter(
                executor,
                drafter,
                rows,
                max_batch_size=max_batch_size,
                num_beams=shape.num_beams,
                low_rank=low_rank,
            )
            return
        self._drafter = drafter
        self._embedding = embedding
        self._head = draft_head(drafter, rows)
        if isinstance(executor, GraphExecutor | CudaExecutor):
            self._graphs = GraphSearch(drafter, embedding, self._head, shape, executor.pool)
        if isinstance(executor, CudaExecutor):
            head = self._head if low_rank is None else _factored(self._head, low_rank)
            if SearchKernel.unsupported(drafter, embedding, head, shape) is None:
                self._graphs = SearchKernel(drafter, embedding, head, shape, max_batch_size=max_batch_size)

    def propose(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> list[Tree]:
        """Contexts [H] and last tokens of B sequences -> their trees."""
        if self._graphs is not None:
            return self._trees(roots, *self._graphs.search(contexts, roots))
        beams = self.beams(torch.stack(list(contexts)), roots)
        return self._trees(roots, beams.tokens.tolist(), beams.finite.tolist())

    def beams(self, contexts: Tensor, roots: Sequence[int]) -> Beams:
        """Contexts [B, H] and last tokens of B sequences -> beams and their scores; on a GPU without the graph."""
        tokens = torch.tensor(list(roots), device=contexts.device)
        if self._native is not None:
            return self._native.search(contexts, tokens, self.shape)
        return beam_search(self._drafter, self._embedding, contexts, tokens, self.shape, head=self._head)

    def _trees(self, roots: Sequence[int], beams: list[list[list[int]]], finite: list[bool]) -> list[Tree]:
        if not all(finite) and self.error is None:
            self.error = not_finite("the drafter's scores", str(self._dtype).removeprefix("torch."), where="drafter")
        return [Tree.merge(rows) if ok else Tree.root(r) for r, rows, ok in zip(roots, beams, finite, strict=True)]
