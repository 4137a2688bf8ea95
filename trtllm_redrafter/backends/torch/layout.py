"""Token trees as integers in one buffer: packed on the host, copied once, taken apart by what a graph has captured.

layout = Layout(rows=32, batch=1, nodes=26, path=6)
graph.fill(layout.pack([slot], [base], [tree]))
parts = layout.split(graph.input)           # views: parts["tokens"], parts["depths"], ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtllm_redrafter.redrafter.token_tree import Tree


@dataclass(frozen=True)
class Layout:
    """Which integers a pass of `rows` rows is given. A row is a node of a tree; rows of all trees stand end to end."""

    rows: int
    batch: int
    nodes: int  # of a tree, at most
    path: int  # longest path of a node, root included
    chain: bool = False
    """Prompt tokens: every node's path is all nodes of its sequence before it, and not written down."""
    padded: bool = False
    """Each tree takes `nodes` rows, so that rows * batch is a matrix; `real` lists the rows that are nodes."""

    @property
    def sizes(self) -> dict[str, int]:
        """The parts in their order: per row sequence, depth, path and token, per sequence slot, base and first row.

        A node's path is filled up with the node itself. A padding row has the sequence -1, where trees are padded a
        path of -1, and zeros elsewhere.
        """
        rows, batch = self.rows, self.batch
        paths = 0 if self.chain else rows * self.path
        real = {"real": rows} if self.padded else {}
        return {
            "sequence": rows, "depths": rows, "paths": paths, "slots": batch, "bases": batch, "first": batch + 1,
            "tokens": rows, **real,
        }  # fmt: skip

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    def pack(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree], *, spare: int = 0) -> list[int]:
        """The whole buffer. Where there are fewer trees than `batch`, the others are empty ones in the slot `spare`."""
        sequence, depths, paths, tokens, first = [], [], [], [], [0]
        fill = -1 if self.padded else 0
        for number, tree in enumerate(trees):
            missing = self.nodes - len(tree) if self.padded else 0
            sequence += [number] * len(tree) + [-1] * missing
            depths += tree.depths + [0] * missing
            tokens += tree.tokens + [0] * missing
            if not self.chain:
                for path in tree.paths():
                    paths += path + path[-1:] * (self.path - len(path))
                paths += [fill] * (missing * self.path)
            first.append(len(tokens))
        missing, empty = self.rows - len(tokens), self.batch - len(trees)
        real = [row for row, number in enumerate(sequence) if number >= 0] if self.padded else []
        return [
            *sequence, *[-1] * missing, *depths, *[0] * missing, *paths, *[fill] * (self.sizes["paths"] - len(paths)),
            *slots, *[spare] * empty, *bases, *[0] * empty, *first, *first[-1:] * empty, *tokens, *[0] * missing,
            *real, *([0] * (self.rows - len(real)) if self.padded else []),
        ]  # fmt: skip

    def split(self, packed: Tensor) -> dict[str, Tensor]:
        """The parts of a buffer [size] as views of it."""
        sizes = self.sizes
        return dict(zip(sizes, torch.split(packed, list(sizes.values())), strict=True))
