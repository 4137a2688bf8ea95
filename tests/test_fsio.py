"""Directories appear whole or not at all; paths stay inside; JSON and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from trtllm_redrafter.errors import InputError, OutputError
from trtllm_redrafter.fsio import (
    CREATOR,
    atomic_directory,
    link_or_copy,
    read_json,
    safe_join,
    sha256_file,
    write_json,
)


def mark_ours(directory: Path) -> None:
    write_json(directory / "manifest.json", {"creator": {"name": CREATOR}})


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with atomic_directory(target, overwrite=False) as work:
        (work / "x").write_text("1")
        assert not target.exists()
    assert names(target) == ["x"]
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_a_failure(tmp_path: Path, failure: type[BaseException]) -> None:
    for target in (tmp_path / "out", tmp_path / "new" / "below" / "out"):
        with pytest.raises(failure), atomic_directory(target, overwrite=False) as work:
            (work / "x").write_text("1")
            raise failure
        assert names(tmp_path) == []


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(OutputError, match="exists already"),
        atomic_directory(tmp_path / "out", overwrite=False),
    ):
        pass


def test_overwrite_keeps_the_old_one_until_success(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mark_ours(out)
    (out / "old").write_text("old")
    with pytest.raises(ValueError), atomic_directory(out, overwrite=True) as work:
        (work / "new").write_text("new")
        raise ValueError
    assert names(out) == ["manifest.json", "old"]
    with atomic_directory(out, overwrite=True) as work:
        (work / "new").write_text("new")
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_overwrite_refuses_a_directory_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "home" / "manifest.json").write_text('{"name": "a web app"}')
    with (
        pytest.raises(OutputError, match="not written by this program"),
        atomic_directory(tmp_path / "home", overwrite=True),
    ):
        pass
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_overwrite_takes_an_empty_directory_and_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty", overwrite=True) as work:
        (work / "x").write_text("1")
    (tmp_path / "file").write_text("1")
    with pytest.raises(OutputError, match="is a file"), atomic_directory(tmp_path / "file", overwrite=True):
        pass


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="exists already"),
        atomic_directory(tmp_path / "out", overwrite=False) as work,
    ):
        (work / "mine").write_text("1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("1")
    assert names(tmp_path / "out") == ["theirs"]


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def left_by(pid: int, target: Path, kind: str) -> Path:
    """The sibling another process would have left."""
    from trtllm_redrafter import fsio

    left = target.with_name(f"{fsio._sibling_prefix(target, kind)}{pid}-00000000")
    left.mkdir()
    (left / "x").write_text("x")
    return left


def test_leftovers_of_killed_runs_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    dead = left_by(dead_pid(), tmp_path / "out", "partial")
    alive = left_by(os.getppid(), tmp_path / "out", "partial")
    with atomic_directory(tmp_path / "out", overwrite=False):
        pass
    assert not dead.exists()
    assert alive.exists()


def test_an_output_set_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    aside = left_by(dead_pid(), tmp_path / "out", "old")
    mark_ours(aside)
    with pytest.raises(OutputError, match="exists already"), atomic_directory(tmp_path / "out", overwrite=False):
        pass
    assert names(tmp_path / "out") == ["manifest.json", "x"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_refusals_of_the_system_become_output_errors(tmp_path: Path, code: int) -> None:
    with pytest.raises(OutputError) as e, atomic_directory(tmp_path / "out", overwrite=False):
        raise OSError(code, os.strerror(code))
    assert e.value.problem.remedy
    assert names(tmp_path) == []


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    with pytest.raises(InputError, match="cannot read"):
        sha256_file(tmp_path / "y")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a\0b"])
def test_paths_that_leave_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="leads outside"):
        safe_join(tmp_path, name)


def test_links_that_leave_the_directory(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "secret").write_text("x")
    (base / "link").symlink_to(tmp_path / "secret")
    (base / "fine").symlink_to(base / "sub")
    with pytest.raises(InputError, match="leads outside"):
        safe_join(base, "link")
    assert safe_join(base, "fine") == base / "fine"
    assert safe_join(base, "a/b.safetensors") == base / "a" / "b.safetensors"


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text("x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert safe_join(snapshot, "model.safetensors").read_text() == "x"


@pytest.mark.parametrize("text", ["", "{", "[1]", "nan", '"x"', "\ufeff{}", "[" * 100_000])
def test_malformed_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError) as e:
        read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(e.value)


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ä": [1, None]})
    assert read_json(tmp_path / "x.json") == {"ä": [1, None]}
    with pytest.raises(InputError, match="missing"):
        read_json(tmp_path / "y.json")


def test_link_or_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    link_or_copy(tmp_path / "a", tmp_path / "linked")
    assert (tmp_path / "linked").stat().st_ino == (tmp_path / "a").stat().st_ino

    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "link", other_disk)
    link_or_copy(tmp_path / "a", tmp_path / "copied")
    assert (tmp_path / "copied").stat().st_ino != (tmp_path / "a").stat().st_ino
    assert json.dumps((tmp_path / "copied").read_text()) == '"x"'
