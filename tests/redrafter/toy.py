"""Base models and drafters small enough to check by reading."""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.config import DrafterConfig
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.reference import TokenTree


def make_beams(tokens: list[list[list[int]]], scores: list[list[list[float]]] | None = None) -> Beams:
    """Beams of a batch from literal tokens, with path scores 0 unless given."""
    table = torch.tensor(tokens)
    return Beams(table, torch.zeros(table.shape) if scores is None else torch.tensor(scores), None)


def random_drafter(vocab: int, hidden: int = 8, exit_dim: int = 12, *, seed: int = 0, rnn: bool = True) -> Drafter:
    torch.manual_seed(seed)
    drafter = Drafter(DrafterConfig(vocab, hidden, exit_dim, 1, rnn))
    with torch.no_grad():
        drafter.lm_head.weight.mul_(4.0)
    return drafter


class ToyBase:
    """A base model that depends on the last two tokens only: logits = table[x_{i-1}, x_i], all rows random."""

    def __init__(self, vocab: int, *, seed: int, sharpness: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocab, vocab, vocab, generator=generator) * sharpness

    def logits(self, before: int, last: int) -> Tensor:
        return self.table[before, last]

    def tree_logits(self, before: int, tree: TokenTree) -> Tensor:
        """[1, T, V] for a batch of one; `before` is the token in front of the root."""
        tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
        rows = [self.table[before if p < 0 else tokens[p], t] for t, p in zip(tokens, parents, strict=True)]
        return torch.stack(rows).unsqueeze(0)
