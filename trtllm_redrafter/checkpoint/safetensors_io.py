"""safetensors files: a validating header reader, and headers of new files.

The library's own reader rejects a bad file with a Rust error that names neither the file nor the tensor, and its writer
needs all tensors in memory. Here a header is checked in full before any data is used, and the header of a new file is
made from shapes alone, so that tensors can be streamed to their final place:

    file = SafetensorsFile.open(Path("model.safetensors"))      # a mapping from names to `StoredTensor`
    file["lm_head.weight"].shape                 # (32000, 4096)
    file["lm_head.weight"].read(0, 16)           # rows 0..15, copied
    file["lm_head.weight"].load()                # a view of the mapped file
    header, names = new_header([("a", "F32", (2, 3))])

Format: 8 bytes header length (little endian), JSON {name: {dtype, shape, data_offsets}}, then the data without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trtllm_redrafter.checkpoint.stored_tensor import (
    DAMAGED,
    STORED_DTYPES,
    TORCH_DTYPES,
    DataFile,
    StoredTensor,
    tensor_bytes,
)
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.paths import open_regular
from trtllm_redrafter.scratch import replaced_file

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

MAX_DIMENSIONS = 16
"""Model weights have one to four; PyTorch's own limit is 64."""


@dataclass(frozen=True)
class SafetensorsFile(Mapping[str, StoredTensor]):
    """A file with a checked header: a mapping from names to tensors, in file order."""

    path: Path
    size: int
    metadata: Mapping[str, str]
    _tensors: Mapping[str, StoredTensor] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read and check the header; `InputError` names the tensor and what is wrong with it."""
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            text = file.read(length) if 0 < length <= min(MAX_HEADER_BYTES, size - 8) else b""
        if size < 8:
            raise InputError("the file is too short for safetensors", where=path, why=f"{size} bytes", remedy=DAMAGED)
        if length > MAX_HEADER_BYTES or 8 + length > size:
            why = f"it says {length} bytes, the whole file has {size}"
            raise InputError("the header is longer than the file or the limit", where=path, why=why, remedy=DAMAGED)
        if len(text) != length or not text.startswith(b"{"):
            raise InputError("the header is not a safetensors header", where=path, remedy=DAMAGED)
        entries = _parse(text, path)
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise InputError("the header's __metadata__ is not a map of texts", where=path, remedy=DAMAGED)
        data = DataFile(path, size)
        tensors = [_stored_tensor(name, entry, 8 + length, data) for name, entry in entries.items()]
        tensors.sort(key=lambda t: (t.begin, t.end))
        _check_offsets(tensors, 8 + length, size, path)
        return cls(path, size, metadata, {t.name: t for t in tensors})

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise InputError("the header is not valid JSON", where=path, why=str(e), remedy=DAMAGED) from e
    if not isinstance(value, dict):
        raise InputError("the header is not a JSON object", where=path, remedy=DAMAGED)
    return value


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _stored_tensor(name: str, entry: Any, data_start: int, file: DataFile) -> StoredTensor:
    path = file.path
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets or ()) != 2:
        raise InputError(f"the header entry of tensor {name!r} is malformed", where=path, remedy=DAMAGED)
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
        raise InputError(f"the size of tensor {name!r} does not fit its shape", where=path, why=why, remedy=DAMAGED)
    found = StoredTensor(file, name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    expected = math.prod(shape) * found.itemsize
    if found.nbytes != expected:
        why = f"{dtype} {list(shape)} takes {expected} bytes, the offsets span {found.nbytes}"
        raise InputError(f"the size of tensor {name!r} does not fit its shape", where=path, why=why, remedy=DAMAGED)
    return found


def _check_offsets(tensors: list[StoredTensor], data_start: int, file_size: int, path: Path) -> None:
    """Tensors must be contiguous, without gap or overlap, and end with the file."""
    at = data_start
    for tensor in tensors:
        if tensor.begin != at:
            why = f"it starts at byte {tensor.begin}, the one before ends at {at}"
            what = f"tensor {tensor.name!r} overlaps another one or leaves a hole"
            raise InputError(what, where=path, why=why, remedy=DAMAGED)
        at = tensor.end
    if at != file_size:
        what = "the file is truncated" if at > file_size else "the file has bytes that belong to no tensor"
        why = f"its header describes {at} bytes, it has {file_size}"
        raise InputError(what, where=path, why=why, remedy=DAMAGED)


def new_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """The header of a file with these (name, dtype, shape), and the names in the order in which their data follows.

    The order is the library's own, so that equal content gives equal bytes.
    """
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
    return struct.pack("<Q", len(text)) + text, [name for name, _, _ in ordered]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are in memory anyway (drafters, training states, tests); conversions stream instead.

    The bytes equal those of the safetensors library, whose own writer goes through a temporary file and so leaves files
    that only their owner can read; these get the permissions of the umask. An existing file is replaced by a rename,
    since tensors may still be mapped from it.
    """
    shapes = ((name, STORED_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    header, names = new_header(shapes, metadata)
    with replaced_file(path) as scratch, scratch.open("wb") as file:
        file.write(header)
        file.writelines(tensor_bytes(tensors[name]) for name in names)
