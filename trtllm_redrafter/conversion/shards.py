"""Which bytes go into which rank file: the plan of one rank, and the blocks that carry it out.

A rank file is planned tensor by tensor as pieces of sources (rows, columns, zero rows for padding). `blocks` walks
such a plan and yields the file's content in order, a few megabytes at a time; writing it and checking a file
against it are the same walk.

    plan = shard_base(config, sources, rank=0)
    for block in blocks(plan.tensors["lm_head.weight"]): ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.finite import non_finite_count
from trtllm_redrafter.checkpoint.layout import TensorSpec, rank_slice
from trtllm_redrafter.checkpoint.safetensors_io import TORCH_DTYPES, Layout
from trtllm_redrafter.conversion.sources import Source
from trtllm_redrafter.errors import InputError, MismatchError

BLOCK_BYTES = 2 * 2**20
"""Size of a computed block: large enough to hide Python, small enough that memory stays flat."""


@dataclass(frozen=True)
class Piece:
    """Rows, and maybe only some columns, of a source; without a source, rows of zeros."""

    source: Source | None
    start: int
    stop: int
    cols: tuple[int, int] | None = None


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of a rank file and the pieces it is stacked from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class RankPlan:
    """All tensors of one rank file, and the file's layout."""

    rank: int
    tensors: Mapping[str, TensorPlan]
    layout: Layout

    @classmethod
    def of(cls, rank: int, tensors: Mapping[str, TensorPlan]) -> RankPlan:
        return cls(rank, tensors, Layout.of((t.name, t.dtype, t.shape) for t in tensors.values()))


@dataclass(frozen=True)
class Extent:
    """Bytes that lie in a file exactly as they are needed."""

    path: Path
    begin: int
    end: int


Block = Extent | Tensor
"""What `blocks` yields: bytes to copy from a file, or a computed tensor."""


def plan_tensor(spec: TensorSpec, source: Source, config: CheckpointConfig, rank: int) -> TensorPlan:
    """The part of a joined source that rank `rank` holds."""
    part = rank_slice(spec, config, rank)
    pieces = [Piece(source, start, stop, part.cols) for start, stop in part.rows if stop > start]
    if part.zero_rows:
        pieces.append(Piece(None, 0, part.zero_rows))
    return TensorPlan(spec.name, spec.dtype, part.shape(spec.shape), tuple(pieces))


def whole(name: str, source: Source) -> TensorPlan:
    """A tensor that passes through as it is."""
    rows = source.shape[0] if source.shape else 1
    return TensorPlan(name, source.dtype, source.shape, (Piece(source, 0, rows),))


def blocks(plan: TensorPlan) -> Iterator[Block]:
    """The content of a planned tensor, in order, cast to its dtype."""
    row_shape = plan.shape[1:]
    for piece in plan.pieces:
        if piece.source is None:
            yield from _zeros(plan, piece.stop - piece.start)
            continue
        extents = piece.source.extents(piece.start, piece.stop)
        if extents is not None and piece.cols is None and piece.source.dtype == plan.dtype:
            yield from (Extent(path, begin, end) for path, begin, end in extents)
            continue
        source_row = math.prod(piece.source.shape[1:]) * TORCH_DTYPES[piece.source.dtype].itemsize
        step = max(1, BLOCK_BYTES // max(source_row, math.prod(row_shape) * 4, 1))
        for start in range(piece.start, piece.stop, step):
            yield _computed(plan, piece, start, min(start + step, piece.stop))


def _zeros(plan: TensorPlan, rows: int) -> Iterator[Tensor]:
    width = plan.shape[1:]
    step = max(1, BLOCK_BYTES // max(math.prod(width) * 4, 1))
    for start in range(0, rows, step):
        yield torch.zeros((min(step, rows - start), *width), dtype=TORCH_DTYPES[plan.dtype])


def _computed(plan: TensorPlan, piece: Piece, start: int, stop: int) -> Tensor:
    assert piece.source is not None
    values = piece.source.read(start, stop)
    if piece.cols is not None:
        values = values[:, piece.cols[0] : piece.cols[1]]
    _check_finite(values, plan, piece.source)
    cast = values.to(TORCH_DTYPES[plan.dtype]).contiguous()
    if plan.dtype == "F16" and piece.source.dtype != "F16":
        _check_range(values, cast, plan, piece.source)
    return cast


def _check_finite(values: Tensor, plan: TensorPlan, source: Source) -> None:
    """What is computed is looked at; bytes that are copied as they are, `build` and `verify` look at."""
    count = non_finite_count(values.contiguous())
    if count:
        raise InputError(
            f"{plan.name!r} would have {count} or more values that are not finite (NaN or infinite)",
            where=source.where,
            why="the model's own weights have them: every answer would be nonsense",
            remedy="download the model again, or use an intact one",
        )


def _check_range(values: Tensor, cast: Tensor, plan: TensorPlan, source: Source) -> None:
    """float16 ends at 65504; a larger weight would become infinite without a word."""
    lost = (torch.isinf(cast) & torch.isfinite(values)).sum().item()
    if lost:
        raise MismatchError(
            f"{lost} value(s) of {plan.name!r} do not fit float16",
            where=source.where,
            why=f"the largest is {values[torch.isfinite(values)].abs().max().item():.6g}, float16 ends at 65504",
            remedy="convert with --dtype bfloat16",
        )
