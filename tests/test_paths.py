"""What may be read, and where may be written: decided before the work, and never by waiting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trtllm_redrafter.errors import InputError, OutputError
from trtllm_redrafter.fsio import read_json, sha256_file, write_json
from trtllm_redrafter.memory import is_out_of_memory
from trtllm_redrafter.paths import check_place, explain_os_error, name_problem, open_regular, read_regular


def make(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "link to itself", "missing"])
@pytest.mark.parametrize("reader", [read_json, sha256_file, lambda path: read_regular(path, 100)])
def test_only_regular_files_are_opened(kind: str, reader: object, tmp_path: Path) -> None:
    with pytest.raises(InputError) as e:
        reader(make(tmp_path / "config.json", kind))  # type: ignore[operator]
    assert e.value.problem.where == str(tmp_path / "config.json")
    said = {"pipe": "a pipe", "device": "a character device", "directory": "a directory", "missing": "missing"}
    assert said.get(kind, "cannot read") in str(e.value) or "No such file" in str(e.value)


def test_a_regular_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * 3_000_000)
    assert read_regular(file, 4_000_000) == file.read_bytes()
    with open_regular(file) as opened:
        assert opened.read(2) == b"xx"
    with pytest.raises(InputError, match=r"too large[\s\S]*3,000,000 bytes, at most 10 are read"):
        read_regular(file, 10)


def test_names() -> None:
    assert name_problem("a" * 255) is None and "255 bytes" in str(name_problem("ä" * 128))
    assert "4095" in str(name_problem("a/" * 2500))
    assert "UTF-8" in str(name_problem(Path(os.fsdecode(b"x\xff"))))
    assert "zero byte" in str(name_problem("a\0b"))


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_place(tmp_path / "new" / "deep" / "output", 1)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OutputError, match="not enough disk space"):
        check_place(tmp_path / "output", 2**62)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file is where a directory"):
        check_place(tmp_path / "file" / "x")
    with pytest.raises(OutputError, match="too long"):
        check_place(tmp_path / ("x" * 300))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission"):
        check_place(tmp_path / "output")


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Status:
        f_flag = os.ST_RDONLY
        f_bavail = f_blocks = f_bfree = f_frsize = 1

    monkeypatch.setattr(os, "statvfs", lambda _: Status)
    with pytest.raises(OutputError, match="read-only"):
        check_place(tmp_path / "output")


def test_json_with_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    value = {"path": os.fsdecode(b"x\xff"), "other": "ä"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    write_json(tmp_path / "b.json", {"other": "ä"})
    assert "ä" in (tmp_path / "b.json").read_text(encoding="utf-8")


def test_errors_of_the_system() -> None:
    long = explain_os_error(OSError(36, "File name too long", "a" * 300))
    full = explain_os_error(OSError(28, "No space left on device", "/x"))
    assert isinstance(long, InputError) and isinstance(full, OutputError)
    assert explain_os_error(OSError("no file")) is None
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert is_out_of_memory(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))
