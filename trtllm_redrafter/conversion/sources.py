"""Where the numbers of a conversion come from: tensors in files, in memory, stacked, or multiplied out.

A source hands out rows, so that no one ever holds a whole large tensor. A file's rows are read straight into the
block that is written next, not through a memory map: page faults would cost more than the copy, and mapped pages
count as this process's memory until the kernel takes them back.

    source = FileSource(path, header["model.norm.weight"])
    source.read(0, 16)            # rows 0..15, in the stored dtype
    Stacked((q, k, v))            # one source whose rows are q's, then k's, then v's
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.safetensors_io import STORED_DTYPES, TORCH_DTYPES, TensorInfo
from trtllm_redrafter.errors import InputError

FOLD_ROWS = 1024
"""Rows of one multiplication in `Folded`; a fixed grid, so that every split over ranks gives the same bits."""


class Source(Protocol):
    """A two-dimensional (or smaller) tensor that is read by rows."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def where(self) -> str: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the source's dtype; a 0-d tensor has one row."""
        ...

    def extents(self, start: int, stop: int) -> Iterator[tuple[Path, int, int]] | None:
        """(file, first byte, end) of these rows, in order, when they lie in files as they are; else None."""
        ...


class OpenFiles:
    """File descriptors shared by all readers of a conversion; reading at an offset is thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Path, int] = {}

    def read_into(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`; `InputError` when the file has become shorter than its header said."""
        fd = self._descriptor(path)
        done = 0
        while done < len(buffer):
            count = os.preadv(fd, [buffer[done:]], offset + done)
            if count == 0:
                raise InputError(
                    "the file became shorter while it was read", where=path, remedy="leave it alone and try again"
                )
            done += count

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._open[path]


@dataclass(frozen=True)
class FileSource:
    """A tensor in a safetensors file."""

    path: Path
    info: TensorInfo
    files: OpenFiles = field(compare=False)

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def where(self) -> str:
        return f"{self.path}, tensor {self.info.name}"

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.info.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        block = torch.empty(shape, dtype=TORCH_DTYPES[self.dtype])
        if block.numel():
            view = memoryview(block.reshape(-1).view(torch.uint8).numpy().data)
            self.files.read_into(self.path, view, self.info.begin + start * self._row_bytes)
        return block

    def extents(self, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
        yield self.path, self.info.begin + start * self._row_bytes, self.info.begin + stop * self._row_bytes


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is in memory already (a `.pt` file)."""

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

    def extents(self, start: int, stop: int) -> None:
        return None


@dataclass(frozen=True)
class Stacked:
    """Several sources as one, row after row. All have the same width; dtypes may differ (then rows are float32)."""

    parts: tuple[Source, ...]

    @property
    def dtype(self) -> str:
        dtypes = {part.dtype for part in self.parts}
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def where(self) -> str:
        return self.parts[0].where

    def read(self, start: int, stop: int) -> Tensor:
        rows = [part.read(a, b).to(TORCH_DTYPES[self.dtype]) for part, a, b in self._cut(start, stop)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def extents(self, start: int, stop: int) -> Iterator[tuple[Path, int, int]] | None:
        found = [(part.extents(a, b), part) for part, a, b in self._cut(start, stop)]
        if len({part.dtype for part in self.parts}) > 1 or any(extent is None for extent, _ in found):
            return None
        return (piece for extent, _ in found if extent is not None for piece in extent)

    def _cut(self, start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
        """The rows of each part inside [start, stop)."""
        at = 0
        for part in self.parts:
            a, b = max(start - at, 0), min(stop - at, part.shape[0])
            if a < b:
                yield part, a, b
            at += part.shape[0]


@dataclass(frozen=True)
class Folded:
    """The drafter's LM head written as base head [V, H] times factor [H, E], multiplied out in float32."""

    head: Source
    factor: Source

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.head.shape[0], self.factor.shape[1])

    @property
    def where(self) -> str:
        return self.factor.where

    def read(self, start: int, stop: int) -> Tensor:
        factor = self.factor.read(0, self.factor.shape[0]).to(torch.float32)
        rows = []
        for block in range(start - start % FOLD_ROWS, stop, FOLD_ROWS):
            end = min(block + FOLD_ROWS, self.head.shape[0])
            product = self.head.read(block, end).to(torch.float32) @ factor
            rows.append(product[max(start - block, 0) : stop - block])
        return torch.cat(rows)

    def extents(self, start: int, stop: int) -> None:
        return None


def stacked(parts: Sequence[Source]) -> Source:
    """One source of the parts; a single part stays itself."""
    return parts[0] if len(parts) == 1 else Stacked(tuple(parts))
