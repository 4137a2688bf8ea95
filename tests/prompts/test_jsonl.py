"""Lines of any file or stream, and what is said of one that is none."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.prompts import jsonl
from trtllm_redrafter.prompts.jsonl import check_source, dump_line, read_lines

SEPARATORS = "one\u2028two\x85three\x0cfour\u2029five\x1e"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    rows = [{"prompt": SEPARATORS}, {"prompt": "plain"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    lines = list(read_lines(write(tmp_path / "p.jsonl", text.encode())))
    assert lines == [(1, rows[0]), (2, rows[1])]


@pytest.mark.parametrize(
    "content", [b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}', b'{"a": 1}\r\n  \r\n{"a": 2}\r\n', b'{"a": 1}\n\x0c\n{"a": 2}\n']
)
def test_marks_and_line_ends_of_other_systems(tmp_path: Path, content: bytes) -> None:
    lines = list(read_lines(write(tmp_path / "p.jsonl", content)))
    assert lines == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": "\xff"}', "byte 8 is 0xff"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "longer than"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, said: str
) -> None:
    if said == "longer than":
        monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 256)
    (number, bad), good = read_lines(write(tmp_path / "p.jsonl", line + b'\n{"a": 3}\n'))
    assert number == 1 and isinstance(bad, InputError) and said in bad.render()
    assert good == (2, {"a": 3})


def test_a_pipe_is_read_once_as_it_comes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    first_read = threading.Event()

    def feed() -> None:
        with pipe.open("wb", buffering=0) as file:
            file.write(b'{"a": 1}\n')
            first_read.wait(10)
            file.write(b'{"a": 2}\n')

    writer = threading.Thread(target=feed)
    writer.start()
    check_source(pipe)  # takes nothing away
    lines = read_lines(pipe)
    assert next(lines)[1] == {"a": 1}
    first_read.set()
    assert next(lines)[1] == {"a": 2}
    assert next(lines, None) is None
    writer.join()


def test_a_pipe_that_nobody_writes_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "WRITER_SECONDS", 0.05)
    os.mkfifo(tmp_path / "pipe")
    before = threading.active_count()
    with pytest.raises(InputError, match="nobody writes into the pipe"):
        list(read_lines(tmp_path / "pipe"))
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before  # nothing waits on


def test_a_stream_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_STREAM_BYTES", 100)
    content = b'{"a": 1}\n' * 50
    with write(tmp_path / "p.jsonl", content).open("rb") as file, pytest.raises(InputError, match="from a stream"):
        list(jsonl.lines_of(file, "pipe", endless=True))
    assert len(list(read_lines(tmp_path / "p.jsonl"))) == 50


@pytest.mark.parametrize(
    ("path", "said"),
    [("/dev/zero", "a device"), (".", "a directory"), ("none.jsonl", "does not exist"), ("x" * 300, "cannot read")],
)
def test_what_is_no_file_of_lines(path: str, said: str) -> None:
    for read in (check_source, lambda p: list(read_lines(p))):
        with pytest.raises(InputError, match=said):
            read(Path(path))


def test_utf16_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="UTF-16"):
        list(read_lines(write(tmp_path / "p.jsonl", '{"a": 1}'.encode("utf-16"))))


def test_written_lines_are_read_again_and_nobody_breaks_them() -> None:
    value = {"text": SEPARATORS + "\x1b[31m\x9b\u202e é 😀", "path": os.fsdecode(b"/tmp/\xff"), "n": None}
    line = dump_line(value)
    assert json.loads(line) == value
    assert len(line.splitlines()) == 1 and "é 😀" in line
    line.encode()
    assert not any(c in line for c in "\x1b\x9b\u202e\x85\u2028")


def test_numbers_that_json_does_not_have_are_null() -> None:
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": (float("-inf"), {"d": 2})}
    assert json.loads(dump_line(value)) == {"a": None, "b": [1.5, None], "c": [None, {"d": 2}]}
