"""What a rank file is made of: where its numbers come from, and which part of them the rank holds.

A source (a tensor in a file, in memory, or a product) is read by rows, so that no large tensor is ever in memory as a
whole. Several sources stand for one tensor whose rows are the first one's, then the second one's (q, k, v; the ranks of
an LM head). A rank's tensor is planned as rows and columns of sources, and rows of zeros for padding; `blocks` walks
such a plan and yields the content in order, a few megabytes at a time. Writing a file and checking a file against its
plan are the same walk.

    SafetensorsFile.open(path)["model.norm.weight"].read(0, 16)     # rows 0..15, in the stored dtype
    tensor = rank_tensor(specs["lm_head.weight"], (head,), config, rank=0)
    for block in blocks(tensor): ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.layout import RankSlice, TensorSpec, rank_slice
from trtllm_redrafter.checkpoint.names import rank_file_name
from trtllm_redrafter.checkpoint.safetensors_io import new_header
from trtllm_redrafter.checkpoint.stored_tensor import STORED_DTYPES, TORCH_DTYPES, StoredTensor, non_finite_count
from trtllm_redrafter.errors import InputError, MismatchError

FOLD_ROWS = 1024
"""Rows of one multiplication in `LowRankSource`; a fixed grid, so that every split over ranks gives the same bits."""

BLOCK_BYTES = 2 * 2**20
"""Size of a computed block: large enough to hide Python, small enough that memory stays flat."""


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
class LowRankSource:
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


@dataclass(frozen=True)
class RankTensor:
    """One tensor of a rank file: a part of the rows of `sources`, taken one after the other, cast to `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    part: RankSlice

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class RankFile:
    """One rank's file: its header, and its tensors in the order of their data."""

    rank: int
    header: bytes
    tensors: tuple[RankTensor, ...]

    @classmethod
    def of(cls, rank: int, tensors: Mapping[str, RankTensor]) -> RankFile:
        header, names = new_header((t.name, t.dtype, t.shape) for t in tensors.values())
        return cls(rank, header, tuple(tensors[name] for name in names))

    @property
    def name(self) -> str:
        return rank_file_name(self.rank)

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


Block = StoredTensor | Tensor
"""What `blocks` yields: rows to copy as they lie in a file, or a computed tensor."""


def rank_tensor(spec: TensorSpec, sources: Sequence[Source], config: CheckpointConfig, rank: int) -> RankTensor:
    """The part of a whole tensor that rank `rank` holds."""
    part = rank_slice(spec, config, rank)
    return RankTensor(spec.name, spec.dtype, part.shape(spec.shape), tuple(sources), part)


def copied(tensor: StoredTensor) -> RankTensor:
    """A tensor that passes through as it is."""
    rows = tensor.shape[0] if tensor.shape else 1
    return RankTensor(tensor.name, tensor.dtype, tensor.shape, (tensor,), RankSlice(((0, rows),), None, 0))


def blocks(tensor: RankTensor) -> Iterator[Block]:
    """The content of a planned tensor, in order, cast to its dtype."""
    for start, stop in tensor.part.rows:
        for source, first, last in row_ranges(tensor.sources, start, stop):
            if isinstance(source, StoredTensor) and tensor.part.cols is None and source.dtype == tensor.dtype:
                yield source.rows(first, last)
            else:
                yield from _cast(tensor, source, first, last)
    yield from _zeros(tensor)


def _cast(tensor: RankTensor, source: Source, start: int, stop: int) -> Iterator[Tensor]:
    row_bytes = math.prod(source.shape[1:]) * TORCH_DTYPES[source.dtype].itemsize
    step = max(1, BLOCK_BYTES // max(row_bytes, math.prod(tensor.shape[1:]) * 4, 1))
    for first in range(start, stop, step):
        yield _computed(tensor, source, first, min(first + step, stop))


def _zeros(tensor: RankTensor) -> Iterator[Tensor]:
    rows, width = tensor.part.zero_rows, tensor.shape[1:]
    step = max(1, BLOCK_BYTES // max(math.prod(width) * 4, 1))
    for start in range(0, rows, step):
        yield torch.zeros((min(step, rows - start), *width), dtype=TORCH_DTYPES[tensor.dtype])


def _computed(tensor: RankTensor, source: Source, start: int, stop: int) -> Tensor:
    values = source.read(start, stop)
    if tensor.part.cols is not None:
        values = values[:, tensor.part.cols[0] : tensor.part.cols[1]]
    _check_finite(values, tensor, source)
    cast = values.to(TORCH_DTYPES[tensor.dtype]).contiguous()
    if tensor.dtype == "F16" and source.dtype != "F16":
        _check_range(values, cast, tensor, source)
    return cast


def _check_finite(values: Tensor, tensor: RankTensor, source: Source) -> None:
    """For computed values only; `build` and `verify` check values that are copied unchanged."""
    count = non_finite_count(values.contiguous())
    if count:
        raise InputError(
            f"{tensor.name!r} would have {count} or more values that are not finite (NaN or infinite)",
            where=source.where,
            why="the model's weights contain them; every output would be meaningless",
            remedy="download the model again, or use an intact one",
        )


def _check_range(values: Tensor, cast: Tensor, tensor: RankTensor, source: Source) -> None:
    """float16 ends at 65504; a larger weight would silently become infinite."""
    lost = (torch.isinf(cast) & torch.isfinite(values)).sum().item()
    if lost:
        raise MismatchError(
            f"{lost} value(s) of {tensor.name!r} do not fit float16",
            where=source.where,
            why=f"the largest is {values[torch.isfinite(values)].abs().max().item():.6g}, float16 ends at 65504",
            remedy="convert with --dtype bfloat16",
        )
