"""Merge a sequence's beams into one tree, so that a shared prefix is verified once.

Node 0 is the root, the token the base model has already guaranteed. Nodes are numbered beam by beam, and within a
beam by position; a token is a new node unless a lower beam has the same prefix. A parent therefore always has a lower
number than its children. Beams [g,5,9], [g,5,7], [g,6,9] become

    number   0  1  2  3  4  5          g ── 5 ── 9
    token    g  5  9  7  6  9          │    └─── 7
    parent  -1  0  1  1  0  4          └─── 6 ── 9

The base model runs over all nodes of a tree at once; with `mask`, each attends to its ancestors and itself.
Slots past a sequence's last node are padding: token 0, parent -1, depth 0, attending only to themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.redrafter.beam_search import Beams


@dataclass(frozen=True)
class TokenTree:
    """Trees of a batch, padded to the same T nodes."""

    tokens: Tensor  # [B, T] int64
    parents: Tensor  # [B, T] int64; -1 for the root and padding
    depths: Tensor  # [B, T] int64; the root is at 0
    mask: Tensor  # [B, T, T] bool; [b, i, j]: node i attends to node j
    draft_indices: Tensor  # [B, K, L+1] int64; node of each beam token, -1 if dropped by `max_nodes`
    lengths: Tensor  # [B] int64; number of nodes, root included

    @property
    def width(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def is_node(self) -> Tensor:
        """[B, T] bool; False for padding."""
        return torch.arange(self.width, device=self.lengths.device) < self.lengths.unsqueeze(1)


def build_tree(beams: Beams, *, max_nodes: int | Tensor | None = None, width: int | None = None) -> TokenTree:
    """Merge common prefixes of `beams`.

    `max_nodes` (one number, or [B]) keeps the root and the likeliest nodes by path score; 1 keeps the root alone. A
    path never gets likelier by growing, so a kept node's parent is kept too. `width` is T; by default that of the
    largest tree, 1 for an empty batch.
    """
    tokens = beams.tokens
    num_beams, length = tokens.shape[1:]
    holder = _first_holder(tokens)  # [B, K, L+1]
    is_node = holder == torch.arange(num_beams, device=tokens.device).view(1, -1, 1)
    if max_nodes is not None:
        is_node = _likeliest(is_node, beams.path_scores, max_nodes)
    flat = is_node.flatten(1)
    numbers = (flat.cumsum(1) - 1).masked_fill(~flat, -1).view_as(holder)
    draft_indices = numbers.gather(1, holder)
    lengths = flat.sum(1)
    if width is None:
        width = int(lengths.max()) if len(lengths) else 1
    parents = F.pad(draft_indices[..., :-1], (1, 0), value=-1)
    depths = torch.arange(length, device=tokens.device).expand_as(tokens)
    parents = _scatter(parents, numbers, width, fill=-1)
    return TokenTree(
        tokens=_scatter(tokens, numbers, width, fill=0),
        parents=parents,
        depths=_scatter(depths, numbers, width, fill=0),
        mask=ancestor_mask(parents, length - 1),
        draft_indices=draft_indices,
        lengths=lengths,
    )


def root_tree(tokens: Tensor, *, width: int = 1) -> TokenTree:
    """Trees with a root only, tokens [B]: autoregressive decoding through the same code."""
    tokens = tokens.to(torch.int64)
    zeros = torch.zeros(tokens.shape[0], width, dtype=torch.int64, device=tokens.device)
    return TokenTree(
        tokens=torch.cat([tokens.view(-1, 1), zeros[:, 1:]], dim=1),
        parents=zeros - 1,
        depths=zeros,
        mask=torch.eye(width, dtype=torch.bool, device=tokens.device).expand(tokens.shape[0], -1, -1),
        draft_indices=zeros[:, :1].unsqueeze(1),
        lengths=torch.ones_like(tokens),
    )


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
        """`build_tree` for one sequence's beams [K][L+1]: same nodes, same numbers."""
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
        """`verification.walk` for one sequence: the accepted nodes, root first."""
        path = [0]
        for node in range(1, len(self.tokens)):  # a node comes after its parent
            last = path[-1]
            if self.parents[node] == last and self.tokens[node] == draws[last]:
                path.append(node)
        return path


def pad(trees: Sequence[Tree], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, depths [B, T] and mask [B, T, T] of a batch, as in `TokenTree`."""
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


def _first_holder(tokens: Tensor) -> Tensor:
    """[B, K, L+1]: the lowest beam with the same tokens up to each position."""
    same = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).cumprod(dim=-1)  # [B, k, other, L+1]
    return same.argmax(dim=2)


def _likeliest(is_node: Tensor, path_scores: Tensor, max_nodes: int | Tensor) -> Tensor:
    """Keep the `max_nodes` best nodes of each sequence; of equal scores, the lower number."""
    scores = path_scores.masked_fill(~is_node, -torch.inf).flatten(1)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    limit = max_nodes.view(-1, 1) if isinstance(max_nodes, Tensor) else max_nodes
    return is_node & (rank < limit).view_as(is_node)


def _scatter(values: Tensor, numbers: Tensor, width: int, *, fill: int) -> Tensor:
    """Put each node's value at its number: [B, K, L+1] -> [B, width]. Tokens that are not nodes are dropped."""
    out = torch.full((values.shape[0], width + 1), fill, dtype=torch.int64, device=values.device)
    place = numbers.flatten(1)
    out.scatter_(1, torch.where(place < 0, width, place), values.flatten(1))
    return out[:, :width]


@dataclass(frozen=True)
class PackedTrees:
    """A batch of trees in the form TensorRT-LLM's graph returns: sequences concatenated, no padding."""

    flat_tokens: Tensor  # [sum N] int32
    generation_lengths: Tensor  # [B] int32
    position_offsets: Tensor  # [B, T] int32; meaningful up to N
    position_ids: Tensor  # [sum N] int32
    packed_mask: Tensor  # [B, T, ceil(T / 32)] int32; bit j % 32 of word j // 32: attends to node j


def pack(tree: TokenTree, position_base: Tensor) -> PackedTrees:
    """`position_base` [B] is the position id of each root."""
    rows = tree.is_node
    positions = position_base.view(-1, 1) + tree.depths
    return PackedTrees(
        flat_tokens=tree.tokens[rows].int(),
        generation_lengths=tree.lengths.int(),
        position_offsets=tree.depths.int(),
        position_ids=positions[rows].int(),
        packed_mask=pack_bits(tree.mask),
    )


def pack_bits(mask: Tensor) -> Tensor:
    """[..., T] bool -> [..., ceil(T / 32)] int32, lowest bit first."""
    words = -(-mask.shape[-1] // 32)
    bits = F.pad(mask.to(torch.int64), (0, words * 32 - mask.shape[-1])).view(*mask.shape[:-1], words, 32)
    packed = (bits * 2 ** torch.arange(32, device=mask.device)).sum(dim=-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()  # bit 31 is the sign
