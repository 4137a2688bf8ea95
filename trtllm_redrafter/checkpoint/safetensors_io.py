"""safetensors files: a validating header reader, tensors without copies, and the layout of a new file.

The library's own reader rejects a bad file with a Rust error that names neither the file nor the tensor, and its writer
needs all tensors in memory. Here a header is checked in full before any data is used, and a new file is laid out from
shapes alone, so that tensors can be streamed to their final place:

    file = SafetensorsFile.open(Path("model.safetensors"))
    file.header["lm_head.weight"].shape          # (32000, 4096)
    file.load("lm_head.weight")                  # a view of the mapped file
    layout = Layout.of([("a", "F32", (2, 3))])   # layout.header_bytes, layout.entries[0].begin

Format: 8 bytes header length (little endian), JSON {name: {dtype, shape, data_offsets}}, then the data without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.paths import open_regular
from trtllm_redrafter.scratch import replaced_file

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

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

MAX_DIMENSIONS = 16
"""Model weights have one to four; PyTorch's own limit is 64."""

_DAMAGED = "download or copy the file again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place: `begin` and `end` are offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def itemsize(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True)
class Header(Mapping[str, TensorInfo]):
    """A checked header: a mapping from names to tensors, in file order."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_size: int

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Any:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read_header(path: Path) -> Header:
    """Read and check a file's header; `InputError` names the tensor and what is wrong with it."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        text = file.read(length) if 0 < length <= min(MAX_HEADER_BYTES, size - 8) else b""
    if size < 8:
        raise InputError("the file is too short for safetensors", where=path, why=f"{size} bytes", remedy=_DAMAGED)
    if length > MAX_HEADER_BYTES or 8 + length > size:
        why = f"it says {length} bytes, the whole file has {size}"
        raise InputError("the header is longer than the file or the limit", where=path, why=why, remedy=_DAMAGED)
    if len(text) != length or not text.startswith(b"{"):
        raise InputError("the header is not a safetensors header", where=path, remedy=_DAMAGED)
    entries = _parse(text, path)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError("the header's __metadata__ is not a map of texts", where=path, remedy=_DAMAGED)
    infos = [_tensor_info(name, entry, 8 + length, path) for name, entry in entries.items()]
    infos.sort(key=lambda t: (t.begin, t.end))
    _check_offsets(infos, 8 + length, size, path)
    return Header(path, {t.name: t for t in infos}, metadata, size)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise InputError("the header is not valid JSON", where=path, why=str(e), remedy=_DAMAGED) from e
    if not isinstance(value, dict):
        raise InputError("the header is not a JSON object", where=path, remedy=_DAMAGED)
    return value


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _tensor_info(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets or ()) != 2:
        raise InputError(f"the header entry of tensor {name!r} is malformed", where=path, remedy=_DAMAGED)
    if dtype not in TORCH_DTYPES:
        raise InputError(
            f"tensor {name!r} has the dtype {dtype!r}",
            where=path,
            why=f"known are {', '.join(TORCH_DTYPES)}",
            remedy="convert the file to one of these, or download it again",
        )
    assert shape is not None and offsets is not None
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) >= 2**62:
        why = f"it has {len(shape)} dimensions" if len(shape) > MAX_DIMENSIONS else "no file holds as many elements"
        raise InputError(f"the size of tensor {name!r} does not fit its shape", where=path, why=why, remedy=_DAMAGED)
    info = TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    expected = math.prod(shape) * info.itemsize
    if info.nbytes != expected:
        why = f"{dtype} {list(shape)} takes {expected} bytes, the offsets span {info.nbytes}"
        raise InputError(f"the size of tensor {name!r} does not fit its shape", where=path, why=why, remedy=_DAMAGED)
    return info


def _check_offsets(infos: list[TensorInfo], data_start: int, file_size: int, path: Path) -> None:
    """Tensors must be contiguous, without gap or overlap, and end with the file."""
    at = data_start
    for info in infos:
        if info.begin != at:
            why = f"it starts at byte {info.begin}, the one before ends at {at}"
            what = f"tensor {info.name!r} overlaps another one or leaves a hole"
            raise InputError(what, where=path, why=why, remedy=_DAMAGED)
        at = info.end
    if at != file_size:
        what = "the file is truncated" if at > file_size else "the file has bytes that belong to no tensor"
        why = f"its header describes {at} bytes, it has {file_size}"
        raise InputError(what, where=path, why=why, remedy=_DAMAGED)


class SafetensorsFile:
    """A safetensors file whose tensors are views of the memory-mapped file.

    The mapping is private: writing into a loaded tensor changes this process's copy of a page, never the file.
    Treat the tensors as read-only nevertheless; other callers see the same memory.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self._map: mmap.mmap | None = None

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        return cls(read_header(path))

    @property
    def path(self) -> Path:
        return self.header.path

    def load(self, name: str) -> Tensor:
        """The tensor as a view of the file; a copy only if it is not aligned there."""
        info = self.header[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.torch_dtype)
        if self._map is None:
            self._map = self._mapped()
            if len(self._map) < self.header.file_size:
                raise InputError(
                    "the file became shorter since it was opened", where=self.path, remedy="leave it alone, try again"
                )
        count = info.nbytes // info.itemsize
        if info.begin % info.itemsize == 0:
            flat = torch.frombuffer(self._map, dtype=info.torch_dtype, count=count, offset=info.begin)
        else:
            flat = torch.frombuffer(bytearray(self._map[info.begin : info.end]), dtype=info.torch_dtype, count=count)
        return flat.reshape(info.shape)

    def _mapped(self) -> mmap.mmap:
        try:
            with open_regular(self.path) as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as e:  # of an empty file
            raise InputError("the file is empty", where=self.path, remedy=_DAMAGED) from e


@dataclass(frozen=True)
class Layout:
    """The layout of a file to be written: header bytes and every tensor's place."""

    header_bytes: bytes
    entries: tuple[TensorInfo, ...]

    @property
    def file_size(self) -> int:
        return self.entries[-1].end if self.entries else len(self.header_bytes)

    @classmethod
    def of(
        cls, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ) -> Layout:
        """Lay out (name, dtype, shape) triples in the library's own order, so that equal content gives equal bytes."""
        rank = {dtype: i for i, dtype in enumerate(TORCH_DTYPES)}
        ordered = sorted(tensors, key=lambda t: (rank[t[1]], t[0].encode()))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        for name, dtype, shape in ordered:
            end = at + math.prod(shape) * TORCH_DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        entries = tuple(
            TensorInfo(n, e["dtype"], tuple(e["shape"]), start + e["data_offsets"][0], start + e["data_offsets"][1])
            for n, e in header.items()
            if n != "__metadata__"
        )
        return cls(struct.pack("<Q", len(text)) + text, entries)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are in memory anyway (drafters, training states, tests); conversions stream instead.

    The bytes equal those of the safetensors library, whose own writer goes through a temporary file and so leaves files
    that only their owner can read; these get the permissions of the umask. An existing file is replaced by a rename,
    since tensors may still be mapped from it.
    """
    layout = Layout.of(((name, STORED_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()), metadata)
    with replaced_file(path) as scratch, scratch.open("wb") as file:
        file.write(layout.header_bytes)
        file.writelines(tensor_bytes(tensors[entry.name]) for entry in layout.entries)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy().data)
