"""Where the numbers of a conversion come from: tensors in files, in memory, or multiplied out.

A source hands out rows, so that no one ever holds a whole large tensor. Several sources stand for one tensor whose
rows are the first one's, then the second one's (q, k, v; the ranks of an LM head):

    SafetensorsFile.open(path)["model.norm.weight"].read(0, 16)     # rows 0..15, in the stored dtype
    read_rows((q, k, v), 0, 4096)                                   # float32
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.stored_tensor import STORED_DTYPES

FOLD_ROWS = 1024
"""Rows of one multiplication in `Folded`; a fixed grid, so that every split over ranks gives the same bits."""


class Source(Protocol):
    """A two-dimensional (or smaller) tensor that is read by rows; a `StoredTensor` is one."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def where(self) -> str: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the source's dtype; a 0-d tensor has one row."""
        ...


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor that is in memory already (of a `.pt` file)."""

    name: str
    path: Path
    tensor: Tensor = field(compare=False)

    @property
    def dtype(self) -> str:
        return STORED_DTYPES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def where(self) -> str:
        return f"{self.path}, tensor {self.name}"

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop] if self.shape else self.tensor


@dataclass(frozen=True)
class Folded:
    """The drafter's LM head written as base head [V, H] times factor [H, E], multiplied out in float32."""

    head: tuple[Source, ...]
    factor: Source

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (row_count(self.head), self.factor.shape[1])

    @property
    def where(self) -> str:
        return self.factor.where

    def read(self, start: int, stop: int) -> Tensor:
        factor = self.factor.read(0, self.factor.shape[0]).to(torch.float32)
        rows = []
        for block in range(start - start % FOLD_ROWS, stop, FOLD_ROWS):
            product = read_rows(self.head, block, min(block + FOLD_ROWS, self.shape[0])) @ factor
            rows.append(product[max(start - block, 0) : stop - block])
        return torch.cat(rows)


def row_count(sources: Sequence[Source]) -> int:
    return sum(source.shape[0] if source.shape else 1 for source in sources)


def row_ranges(sources: Sequence[Source], start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
    """The rows [start, stop) of the sources one after the other, as rows of each."""
    at = 0
    for source in sources:
        rows = row_count([source])
        first, last = max(start - at, 0), min(stop - at, rows)
        if first < last:
            yield source, first, last
        at += rows


def read_rows(sources: Sequence[Source], start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the sources one after the other, in float32."""
    rows = [source.read(a, b).to(torch.float32) for source, a, b in row_ranges(sources, start, stop)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
