"""Draft with a beam search and merge the beams into token trees: what the runner needs of a drafter.

One search belongs to one executor; `drafting.make_search` chooses among `PlainSearch`, `native.drafter.NativeSearch`,
`cuda_graphs.GraphSearch` and `cuda.search.SearchKernel`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from trtllm_redrafter.errors import NumericalError, not_finite
from trtllm_redrafter.redrafter.beam_search import Beams, DraftHead, beam_search
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.token_tree import Tree


class Search(ABC):
    """Proposes one tree per sequence: its root alone where the drafter's numbers are not finite."""

    error: NumericalError | None = None
    """Set when that first happens."""

    def __init__(self, shape: DraftShape, dtype: torch.dtype) -> None:
        self.shape = shape
        self._dtype = dtype

    def note_not_finite(self) -> None:
        """Set `error`: a search has had scores that are not finite."""
        if self.error is None:
            self.error = not_finite("the drafter's scores", self._dtype, where="drafter")

    @abstractmethod
    def beams(self, contexts: Tensor, roots: Sequence[int]) -> Beams:
        """Contexts [B, H] and last tokens of B sequences -> beams and their scores."""

    def search(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> tuple[list[list[list[int]]], list[bool]]:
        """Contexts [H] and last tokens of B sequences -> beams [B][K][L + 1], and whether their scores are finite."""
        beams = self.beams(torch.stack(list(contexts)), roots)
        return beams.tokens.tolist(), beams.finite.tolist()

    def propose(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> list[Tree]:
        """Contexts [H] and last tokens of B sequences -> their trees."""
        beams, finite = self.search(contexts, roots)
        if not all(finite):
            self.note_not_finite()
        return [Tree.merge(rows) if ok else Tree.root(r) for r, rows, ok in zip(roots, beams, finite, strict=True)]


class PlainSearch(Search):
    """`beam_search` as PyTorch runs it, in every dtype on every device."""

    def __init__(self, drafter: Drafter, embedding: Tensor, head: DraftHead, shape: DraftShape) -> None:
        super().__init__(shape, embedding.dtype)
        self._drafter, self._embedding, self._head = drafter, embedding, head

    def beams(self, contexts: Tensor, roots: Sequence[int]) -> Beams:
        return self._run(torch.tensor(list(roots), device=contexts.device), contexts)

    def _run(self, roots: Tensor, contexts: Tensor, missed_ties: list[Tensor] | None = None) -> Beams:
        return beam_search(
            self._drafter, self._embedding, contexts, roots, self.shape, head=self._head, missed_ties=missed_ties
        )
