"""Results in a file: what an interrupted run leaves, and how it is continued."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tiny import Program
from trtllm_redrafter.backends.base import Update
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.locks import exclusive


def write_prompts(path: Path, *prompts: str, **more: Any) -> Path:
    """The first answers take the longest: with two at once they finish in another order than they began."""
    rows = [{"prompt": text, "max_tokens": 12 - 2 * i, **more} for i, text in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", "one", "two", "three", "four", "five")


@pytest.fixture
def line(artefacts: Path, prompts: Path, tmp_path: Path) -> list[object]:
    return ["run", "--engine", artefacts / "engine", "--input", prompts, "--output", tmp_path / "out.jsonl"]


def rows(path: Path) -> list[dict[str, Any]]:
    """Without what takes time, and what drafting beside others may share."""
    found = [json.loads(text) for text in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in found]


def interrupted_after(count: int, monkeypatch: pytest.MonkeyPatch, program: Program, line: list[object]) -> None:
    """A run that Ctrl-C ends once `count` prompts have been answered."""
    real, done = TorchRunner.step, []

    def step(self: TorchRunner) -> list[Update]:
        if len(done) >= count:
            raise KeyboardInterrupt
        updates = real(self)
        done.extend(u for u in updates if u.result is not None)
        return updates

    with monkeypatch.context() as patch:
        patch.setattr(TorchRunner, "step", step)
        assert program(*line) == 130


@pytest.fixture
def whole(program: Program, line: list[object], tmp_path: Path) -> list[dict[str, Any]]:
    """The rows of an undisturbed run, which are in the order of the prompts."""
    assert program(*line) == 0
    found = rows(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()
    assert [row["index"] for row in found] == [0, 1, 2, 3, 4]
    assert [row["id"] for row in found] == [f"line-{i}" for i in range(1, 6)]
    return found


def test_an_interrupted_run_is_gone_on_with(
    program: Program, line: list[object], whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    interrupted_after(2, monkeypatch, program, line)
    finished = rows(out)
    assert len(finished) == 2 and all(row in whole for row in finished)
    assert program(*line) == 5 and "exists already" in program.err and rows(out) == finished
    with out.open("a") as file:
        file.write('{"id": "line-5", "source": "half a li')
    assert program(*line, "--resume", "--json") == 0
    assert program.document["kept"] == 2 and program.document["summary"]["prompts"] == 3
    assert rows(out) == whole
    before = out.stat()
    assert program(*line, "--resume") == 0 and "5 were there already" in program.out
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_changed_prompts_are_answered_again(
    program: Program, line: list[object], whole: list[dict[str, Any]], prompts: Path, tmp_path: Path
) -> None:
    assert program(*line) == 0
    write_prompts(prompts, "one", "2", "three", "four")
    assert program(*line, "--resume", "--json") == 0
    assert program.document["kept"] == 3 and program.document["summary"]["prompts"] == 1
    found = rows(tmp_path / "out.jsonl")
    assert [found[i] for i in (0, 2, 3)] == [whole[i] for i in (0, 2, 3)] and len(found) == 4
    assert found[1]["request_sha256"] != whole[1]["request_sha256"]


def test_other_options_or_engines_keep_nothing(
    program: Program, line: list[object], whole: list[dict[str, Any]], artefacts: Path, tmp_path: Path
) -> None:
    assert program(*line) == 0
    assert program(*line, "--resume", "--stop", "x", "--json") == 0 and program.document["kept"] == 0
    other = ["run", "--engine", artefacts / "plain", *line[3:]]
    assert program(*other, "--resume", "--json") == 0 and program.document["kept"] == 0
    assert [row["token_ids"] for row in rows(tmp_path / "out.jsonl")] == [row["token_ids"] for row in whole]


def test_failed_prompts_are_tried_again(program: Program, line: list[object], prompts: Path, tmp_path: Path) -> None:
    good = prompts.read_text()
    prompts.write_text(good + '{"prompt": "x", "max_tokens": 0}\n{"prompt": \n')
    assert program(*line) != 0
    found = rows(tmp_path / "out.jsonl")
    assert [row["index"] for row in found] == list(range(7)) and "error" in found[5] and "error" in found[6]
    prompts.write_text(good + '{"prompt": "x", "max_tokens": 1}\n{"prompt": "y", "max_tokens": 1}\n')
    assert program(*line, "--resume", "--json") == 0 and program.document["kept"] == 5
    assert not any("error" in row for row in rows(tmp_path / "out.jsonl"))


@pytest.mark.parametrize("content", ["a letter\n", '{"id": "line-1", "text": "of an earlier version"}\n', "[1]\n"])
def test_what_is_no_result_is_neither_kept_nor_lost(
    program: Program, line: list[object], tmp_path: Path, content: str
) -> None:
    (tmp_path / "out.jsonl").write_text(content)
    assert program(*line, "--resume") == 5 and "line 1 is not a result" in program.err
    assert (tmp_path / "out.jsonl").read_text() == content


def test_resume_needs_one_file(program: Program, line: list[object]) -> None:
    assert program(*line, "--resume", "--overwrite") == 2
    assert program(*line[:5], "--resume") == 2 and "needs an --output" in program.err


def test_a_full_disk_leaves_whole_rows(
    program: Program, line: list[object], whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.write, []

    def write(fd: int, data: Any) -> int:
        if len(written) == 2:
            real(fd, bytes(data)[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(fd)
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        assert program(*line) == 5
    assert "disk is full" in program.err and len(rows(tmp_path / "out.jsonl")) == 2
    assert program(*line, "--resume") == 0 and rows(tmp_path / "out.jsonl") == whole


def test_a_reader_that_goes_away(program: Program, line: list[object], tmp_path: Path) -> None:
    pipe = tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    first: list[bytes] = []

    def read() -> None:
        fd = os.open(pipe, os.O_RDONLY)
        first.append(os.read(fd, 100))
        os.close(fd)

    reader = threading.Thread(target=read)
    reader.start()
    assert program(*line, "--overwrite") == 5 and "has closed it" in program.err
    reader.join()
    assert first[0].startswith(b'{"id": ')


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[None]:
    """Another thread stands for another process: it holds the locks of the output and the work directory."""
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        output, work = tmp_path / ".out.jsonl.lock", tmp_path / "work" / ".lock"
        with exclusive(output, "the output", where=output), exclusive(work, "it", where=work):
            held.set()
            end.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    yield
    end.set()
    holder.join()


@pytest.mark.usefixtures("busy")
def test_one_run_at_a_time(program: Program, line: list[object], models: Path, tmp_path: Path) -> None:
    assert program(*line, "--overwrite") == 5
    assert f"process {os.getpid()}: " in program.err and "another process is using the output" in program.err
    assert not (tmp_path / "out.jsonl").exists()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"base: {models / 'base'}\nwork_dir: {tmp_path / 'work'}\nbuild: {{max_seq_len: 64}}\nrun: {{max_tokens: 4}}\n"
    )
    assert program("pipeline", recipe) == 5 and "using the work directory" in program.err
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one two three four five six seven eight nine ten"}\n' * 3)
    train = ["train", "--base", models / "base", "--data", texts, "--output", tmp_path / "drafter"]
    assert program(*train, "--work-dir", tmp_path / "work") == 5 and "using the work directory" in program.err
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == [".lock"]


def test_the_pipeline_goes_on_with_its_results(
    program: Program, models: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out.jsonl"
    recipe.write_text(
        f"base: {models / 'base'}\ndrafter: {models / 'drafter'}\nwork_dir: {tmp_path / 'work'}\n"
        f"build: {{max_seq_len: 96, max_batch_size: 2}}\nrun: {{input: {prompts}, output: {out}, max_tokens: 8}}\n"
    )
    line: list[object] = ["pipeline", recipe]
    interrupted_after(2, monkeypatch, program, line)
    assert len(rows(out)) == 2
    assert program(*line, "--json") == 0
    assert [s["status"] for s in program.document["stages"]] == ["hit", "hit", "miss"]
    assert program.document["stages"][2]["reasons"] == ["it was interrupted"] and program.document["run"]["kept"] == 2
    assert [row["index"] for row in rows(out)] == [0, 1, 2, 3, 4]
    assert program(*line, "--json") == 0
    assert [s["status"] for s in program.document["stages"]] == ["hit", "hit", "hit"]
