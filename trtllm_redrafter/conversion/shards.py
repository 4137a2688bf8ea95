"""Which bytes go into which rank file: the plan of one rank, and the blocks that carry it out.

A rank file is planned tensor by tensor: which rows and columns of which sources, and rows of zeros for padding.
`blocks` walks such a plan and yields the tensor's content in order, a few megabytes at a time; writing a file and
checking a file against its plan are the same walk.

    tensor = rank_tensor(specs["lm_head.weight"], (head,), config, rank=0)
    for block in blocks(tensor): ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.finite import non_finite_count
from trtllm_redrafter.checkpoint.layout import RankSlice, TensorSpec, rank_slice
from trtllm_redrafter.checkpoint.names import rank_file_name
from trtllm_redrafter.checkpoint.safetensors_io import new_header
from trtllm_redrafter.checkpoint.stored_tensor import TORCH_DTYPES, StoredTensor
from trtllm_redrafter.conversion.sources import Source, row_ranges
from trtllm_redrafter.errors import InputError, MismatchError

BLOCK_BYTES = 2 * 2**20
"""Size of a computed block: large enough to hide Python, small enough that memory stays flat."""


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
    """What is computed is looked at; bytes that are copied as they are, `build` and `verify` look at."""
    count = non_finite_count(values.contiguous())
    if count:
        raise InputError(
            f"{tensor.name!r} would have {count} or more values that are not finite (NaN or infinite)",
            where=source.where,
            why="the model's own weights have them: every answer would be nonsense",
            remedy="download the model again, or use an intact one",
        )


def _check_range(values: Tensor, cast: Tensor, tensor: RankTensor, source: Source) -> None:
    """float16 ends at 65504; a larger weight would become infinite without a word."""
    lost = (torch.isinf(cast) & torch.isfinite(values)).sum().item()
    if lost:
        raise MismatchError(
            f"{lost} value(s) of {tensor.name!r} do not fit float16",
            where=source.where,
            why=f"the largest is {values[torch.isfinite(values)].abs().max().item():.6g}, float16 ends at 65504",
            remedy="convert with --dtype bfloat16",
        )
