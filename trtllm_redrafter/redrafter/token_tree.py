"""One sequence's beams merged into a tree, so that a shared prefix is verified once.

Node 0 is the root, the token the base model has already guaranteed. Nodes are numbered beam by beam, and within a
beam by position; a token is a new node unless a lower beam has the same prefix. A parent therefore always has a lower
number than its children. Beams [g,5,9], [g,5,7], [g,6,9] become

    number   0  1  2  3  4  5          g ── 5 ── 9
    token    g  5  9  7  6  9          │    └─── 7
    parent  -1  0  1  1  0  4          └─── 6 ── 9

The base model runs over all nodes of a tree at once; with `pad`'s mask, each attends to its ancestors and itself.
Runners use these trees of plain lists; `reference` has the definition on tensors, for a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """One sequence's tree as plain lists: with a handful of nodes, a tensor operation costs more than all the work."""

    tokens: list[int]
    parents: list[int]  # -1 for the root
    depths: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def root(cls, token: int) -> Tree:
        return cls([token], [-1], [0])

    @classmethod
    def merge(cls, beams: Sequence[Sequence[int]]) -> Tree:
        """`reference.build_tree` for one sequence's beams [K][L+1]: same nodes, same numbers."""
        tokens, parents, depths = [beams[0][0]], [-1], [0]
        child: dict[tuple[int, int], int] = {}
        for beam in beams:
            node = 0
            for depth, token in enumerate(beam[1:], start=1):
                key = (node, token)
                if key not in child:
                    child[key] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depth)
                node = child[key]
        return cls(tokens, parents, depths)

    def paths(self) -> list[list[int]]:
        """For each node, the path from the root to it, both included."""
        found = [[0]]
        for node in range(1, len(self.tokens)):
            found.append([*found[self.parents[node]], node])
        return found

    def walk(self, draws: Sequence[int]) -> list[int]:
        """`reference.walk` for one sequence: the accepted nodes, root first."""
        path = [0]
        for node in range(1, len(self.tokens)):  # a node comes after its parent
            last = path[-1]
            if self.parents[node] == last and self.tokens[node] == draws[last]:
                path.append(node)
        return path


def pad(trees: Sequence[Tree], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, depths [B, T] and mask [B, T, T] of a batch; slots past a tree's last node attend only to themselves."""
    width = max(len(tree) for tree in trees)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)

    parents = padded([tree.parents for tree in trees], -1)
    depths = padded([tree.depths for tree in trees], 0)
    deepest = max(max(tree.depths) for tree in trees)
    return padded([tree.tokens for tree in trees], 0), depths, ancestor_mask(parents, deepest)


def ancestor_mask(parents: Tensor, max_depth: int) -> Tensor:
    """[B, T] parents (-1: none) -> [B, T, T]: True for a node's ancestors and the node itself."""
    batch, width = parents.shape
    mask = torch.eye(width, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    up = torch.where(parents < 0, torch.arange(width, device=parents.device), parents)  # a root is its own parent
    ancestor = up
    for _ in range(max_depth):
        mask.scatter_(2, ancestor.unsqueeze(-1), True)
        ancestor = up.gather(1, ancestor)
    return mask
