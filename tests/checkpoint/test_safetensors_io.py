"""Headers are checked in full; tensors are views; layouts are the library's own bytes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from trtllm_redrafter.checkpoint.safetensors_io import (
    TORCH_DTYPES,
    SafetensorsFile,
    new_header,
    save_tensors,
    tensor_bytes,
)
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.scratch import own_name, partial_stem


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_FILES = {
    "too short": (b"\0\0\0", "too short"),
    "empty": (b"", "too short"),
    "header longer than the file": (struct.pack("<Q", 900) + b"{}", "longer than the file"),
    "absurd header": (struct.pack("<Q", 2**63) + b"{}" * 50, "longer than the file or the limit"),
    "no header": (struct.pack("<Q", 0), "not a safetensors header"),
    "not JSON": (struct.pack("<Q", 8) + b"{xxxxxx}", "not valid JSON"),
    "not UTF-8": (struct.pack("<Q", 4) + b'{"\xff}', "not valid JSON"),
    "a pickle": (b"\x80\x02}q\x00." + b"\0" * 64, "header"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message) as e:
        SafetensorsFile.open(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(e.value) and e.value.problem.remedy


BAD_HEADERS: dict[str, tuple[Any, int, str]] = {
    "list": ([1], 0, "header"),
    "entry is no object": ({"a": 3}, 0, "malformed"),
    "negative size": ({"a": entry("F32", [-1], 0, 4)}, 4, "malformed"),
    "fractional size": ({"a": entry("F32", [1.0], 0, 4)}, 4, "malformed"),  # type: ignore[list-item]
    "true is no size": ({"a": entry("F32", [True], 0, 4)}, 4, "malformed"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "malformed"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "malformed"),
    "unknown dtype": ({"a": entry("Q4", [1], 0, 4)}, 4, "dtype 'Q4'"),
    "size and shape": ({"a": entry("F32", [2], 0, 4)}, 4, "does not fit its shape"),
    "overflowing shape": ({"a": entry("F32", [2**40, 2**40], 0, 4)}, 4, "does not fit its shape"),
    "backwards": ({"a": entry("F32", [1], 4, 0)}, 4, "does not fit its shape"),
    "hole": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, 12, "leaves a hole"),
    "hole at the start": ({"a": entry("F32", [1], 4, 8)}, 8, "leaves a hole"),
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, 8, "overlaps"),
    "truncated": ({"a": entry("F32", [4], 0, 16)}, 15, "truncated"),
    "surplus": ({"a": entry("F32", [4], 0, 16)}, 17, "belong to no tensor"),
    "name twice": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', 1, "twice"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    header, size, message = BAD_HEADERS[case]
    with pytest.raises(InputError, match=message):
        SafetensorsFile.open(write(tmp_path / "x.safetensors", header, b"\0" * size))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        SafetensorsFile.open(tmp_path / "x.safetensors")


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 300), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_is_an_input_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    raw = bytearray(save({"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}))
    if position >= len(raw):
        return
    raw[position] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    path.write_bytes(raw)
    try:
        file = SafetensorsFile.open(path)
    except InputError:
        return
    for tensor in file.values():  # what is accepted can be read without leaving the file
        tensor.load()


def test_layout_is_the_librarys_own(tmp_path: Path) -> None:
    tensors = {
        f"{letter}.{dtype}": torch.zeros(16, dtype=torch.uint8).view(torch_dtype)
        for dtype, torch_dtype in TORCH_DTYPES.items()
        if torch_dtype is not torch.bool
        for letter in "cabä"
    }
    tensors |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(3.0), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "theirs")
    save_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    theirs = SafetensorsFile.open(tmp_path / "theirs")
    header, names = new_header((t.name, t.dtype, t.shape) for t in reversed(list(theirs.values())))
    assert (tmp_path / "theirs").read_bytes().startswith(header)
    assert names == list(theirs) and len(header) == theirs[names[0]].begin


def test_loaded_tensors_are_views_that_cannot_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(4.0), "s": torch.tensor(2.5), "e": torch.empty(0, 2)}, path)
    before = path.read_bytes()
    file = SafetensorsFile.open(path)
    first, second = file["a"].load(), file["a"].load()
    assert first.data_ptr() == second.data_ptr()
    first[0] = 7.0
    assert path.read_bytes() == before
    assert file["s"].load().shape == () and file["s"].load().item() == 2.5
    assert file["e"].load().shape == (0, 2)


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert (8 + len(header)) % 4
    path = write(tmp_path / "x.safetensors", header, bytes(tensor_bytes(values)))
    assert torch.equal(SafetensorsFile.open(path)["a"].load(), values)
    assert torch.equal(load_file(path)["a"], values)


def test_tensor_bytes_of_a_transposed_tensor() -> None:
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert bytes(tensor_bytes(tensor.T)) == tensor.numpy().T.tobytes()


def test_written_files_are_the_librarys_and_follow_the_umask(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.zeros(2, dtype=torch.int32), "c": torch.ones(1).half()}
    metadata = {"format": "pt", "step": "3"}
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    old = os.umask(0o002)
    try:
        save_tensors(tmp_path / "ours", tensors, metadata)
    finally:
        os.umask(old)
    assert (
        SafetensorsFile.open(tmp_path / "ours").metadata
        == SafetensorsFile.open(tmp_path / "theirs").metadata
        == metadata
    )
    assert {k: v.tolist() for k, v in load_file(tmp_path / "ours").items()} == {
        k: v.tolist() for k, v in tensors.items()
    }
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o664
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]


def test_what_a_kill_left_while_tensors_were_written_goes(tmp_path: Path) -> None:
    left = tmp_path / own_name(partial_stem(tmp_path / "state"))
    left.write_bytes(b"half")
    save_tensors(tmp_path / "state", {"a": torch.zeros(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_file_that_is_replaced_while_it_is_mapped(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_tensors(file, {"a": torch.ones(2**16)})
    mapped = SafetensorsFile.open(file)["a"].load()
    save_tensors(file, {"a": torch.zeros(1)})
    assert mapped.sum() == 2**16 and len(SafetensorsFile.open(file)["a"].load()) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2**61] * 300, "data_offsets": [0, 4]}, "300 dimensions"),
        ({"dtype": "F32", "shape": [2**31, 2**31, 4], "data_offsets": [0, 4]}, "no file holds as many"),
    ],
)
def test_shapes_beyond_reason(entry: dict[str, object], message: str, tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(InputError, match=message):
        SafetensorsFile.open(tmp_path / "x.safetensors")
