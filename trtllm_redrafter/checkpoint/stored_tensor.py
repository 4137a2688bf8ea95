"""A tensor in a safetensors file: its position, and its bytes by rows, as a copy or mapped.

tensor = SafetensorsFile.open(path)["lm_head.weight"]
tensor.read(0, 16)                 # rows 0..15, copied
tensor.rows(0, 16)                 # the same rows, as a part of the file
tensor.load()                      # all of it, a view of the mapped file
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.paths import open_regular

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""In the order in which the safetensors library stores tensors (within a dtype: by name)."""

STORED_DTYPES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_EXPONENTS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}
_CHUNK = 2**20
"""Values compared at a time."""

DAMAGED = "download or copy the file again"
"""The remedy for a damaged file."""


class DataFile:
    """The bytes of a file whose header has been checked, read by offset (from any thread) or mapped.

    It is opened when its bytes are first asked for, and closed when its last tensor is garbage-collected.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._map: mmap.mmap | None = None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`; `InputError` when the file has become shorter than its header said."""
        done = 0
        try:
            while done < len(buffer) and (count := os.preadv(self._opened(), [buffer[done:]], offset + done)):
                done += count
        except OSError as e:
            raise InputError("cannot read the file", where=self.path, why=e.strerror, remedy="check the path") from e
        if done < len(buffer):
            remedy = "do not write to it while it is read; try again"
            raise InputError("the file became shorter while it was read", where=self.path, remedy=remedy)

    def mapped(self) -> mmap.mmap:
        """The whole file, mapped privately: writes change this process's copy of a page, never the file."""
        if self._map is None:
            try:
                with open_regular(self.path) as file:
                    found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except ValueError as e:  # of an empty file
                raise InputError("the file is empty", where=self.path, remedy=DAMAGED) from e
            if len(found) < self.size:
                what = "the file became shorter since it was opened"
                raise InputError(what, where=self.path, remedy="do not write to it while it is read; try again")
            self._map = found
        return self._map

    def _opened(self) -> int:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, self._descriptor)
            return self._descriptor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. `begin` and `end` are offsets from the start of the file.

    Rows are read straight into the block that is used next, not through a memory map: page faults would cost more than
    the copy, and mapped pages count as this process's memory until the kernel takes them back. `load` is for tensors
    that stay in use.
    """

    file: DataFile = field(repr=False)
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def where(self) -> str:
        return f"{self.path}, tensor {self.name}"

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def itemsize(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Rows [start, stop), as a part of the file; a 0-d tensor has one row."""
        if not self.shape:
            return self
        row = math.prod(self.shape[1:]) * self.itemsize
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, begin=self.begin + start * row, end=self.begin + stop * row)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the stored dtype, copied into new memory."""
        found = self.rows(start, stop)
        block = torch.empty(found.shape, dtype=self.torch_dtype)
        if block.numel():
            found.read_into(memoryview(block.reshape(-1).view(torch.uint8).numpy().data))
        return block

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on."""
        self.file.read_into(buffer, self.begin + offset)

    def load(self) -> Tensor:
        """The tensor as a view of the mapped file; a copy only if it is not aligned there.

        Treat it as read-only; other callers see the same memory.
        """
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.torch_dtype)
        mapped, count = self.file.mapped(), self.nbytes // self.itemsize
        if self.begin % self.itemsize == 0:
            flat = torch.frombuffer(mapped, dtype=self.torch_dtype, count=count, offset=self.begin)
        else:
            flat = torch.frombuffer(bytearray(mapped[self.begin : self.end]), dtype=self.torch_dtype, count=count)
        return flat.reshape(self.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy().data)


def non_finite_count(tensor: Tensor) -> int:
    """Number of NaN or infinite values in a contiguous tensor; 0 for dtypes without such values.

    A 16- or 32-bit float is finite unless all bits of its exponent are set; comparing integers is as fast as reading.
    """
    if tensor.dtype not in _EXPONENTS or tensor.numel() == 0:
        return 0
    integer, exponent = _EXPONENTS[tensor.dtype]
    found = 0
    for part in torch.split(tensor.reshape(-1).view(integer), _CHUNK):
        found += int(part.bitwise_and(exponent).eq_(exponent).sum())
    return found
