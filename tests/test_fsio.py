"""Directories appear whole or not at all; paths stay inside; JSON and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import socket
from pathlib import Path

import pytest

from trtllm_redrafter import locks
from trtllm_redrafter.errors import InputError, OutputError
from trtllm_redrafter.fsio import (
    CREATOR,
    atomic_directory,
    human_bytes,
    link_or_copy,
    read_json,
    replace_json,
    restore,
    safe_join,
    sha256_file,
    write_json,
)
from trtllm_redrafter.locks import exclusive
from trtllm_redrafter.scratch import claimed, remove_tree, replaced_file

HOST = re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())


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
    left = target.with_name(f".{target.name}.{kind}-{HOST}-{pid}-{secrets.token_hex(4)}")
    left.mkdir()
    (left / "x").write_text("x")
    return left


def test_leftovers_of_killed_runs_are_removed_and_those_in_use_kept(tmp_path: Path) -> None:
    dead = left_by(dead_pid(), tmp_path / "out", "partial")
    recycled = left_by(os.getppid(), tmp_path / "out", "partial")  # its number went to another process
    in_use = left_by(dead_pid(), tmp_path / "out", "partial")  # as of a process in another container
    with claimed(in_use), atomic_directory(tmp_path / "out", overwrite=False):
        pass
    assert not dead.exists() and not recycled.exists()
    assert in_use.exists()


@pytest.mark.parametrize(
    "name", [".out.partial-{host}-12-0000", ".out.partial-other-12-00000000", ".out2.partial-{host}-12-00000000",
             ".out.partial-{host}-x-00000000", ".out.old", ".out.partial-{host}-12-00000000.txt"],
)  # fmt: skip
def test_what_others_have_made_is_not_swept(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.format(host=HOST)
    path.mkdir()
    with atomic_directory(tmp_path / "out", overwrite=False):
        pass
    assert path.exists()


def test_a_link_is_not_followed_by_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    link = tmp_path / f".out.partial-{HOST}-12-00000000"
    link.symlink_to("home")
    with atomic_directory(tmp_path / "out", overwrite=False):
        pass
    assert link.is_symlink() and (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("kind", ["old", "partial"])
def test_what_another_user_has_planted_is_neither_adopted_nor_removed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = left_by(dead_pid(), tmp_path / "out", kind)
    mark_ours(planted)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with atomic_directory(tmp_path / "out", overwrite=False) as work:
        (work / "mine").write_text("1")
    assert names(tmp_path / "out") == ["mine"] and planted.exists()


def test_an_output_set_aside_by_a_living_run_stays_aside(tmp_path: Path) -> None:
    aside = left_by(dead_pid(), tmp_path / "out", "old")
    mark_ours(aside)
    with claimed(aside):
        restore(tmp_path / "out")
    assert aside.exists() and not (tmp_path / "out").exists()


def test_replacing_works_without_an_exchange_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems without renameat2."""
    monkeypatch.setattr("trtllm_redrafter.fsio._exchange", lambda *_: False)
    out = tmp_path / "out"
    for content in ("one", "two"):
        with atomic_directory(out, overwrite=True) as work:
            mark_ours(work)
            (work / "x").write_text(content)
    assert (out / "x").read_text() == "two" and names(tmp_path) == ["out"]


def test_an_output_is_never_absent_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with atomic_directory(out, overwrite=True) as work:
        mark_ours(work)
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the names are exchanged in one step"))
    with atomic_directory(out, overwrite=True) as work:
        mark_ours(work)
        (work / "x").write_text("two")
    assert names(out) == ["manifest.json", "x"] and names(tmp_path) == ["out"]


def test_on_complete_comes_before_the_name(tmp_path: Path) -> None:
    seen = []
    with atomic_directory(tmp_path / "out", overwrite=False, on_complete=lambda work: seen.append(names(work))) as work:
        (work / "x").write_text("1")
        assert not seen
    assert seen == [["x"]]
    with pytest.raises(ValueError), atomic_directory(
        tmp_path / "new", overwrite=False, on_complete=lambda _: (_ for _ in ()).throw(ValueError)
    ):  # fmt: skip
        pass
    assert names(tmp_path) == ["out"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    replace_json(file, {"a": 1})
    (tmp_path / f".a.json.partial-{HOST}-12-00000000").write_text("{")
    with pytest.raises(ValueError), replaced_file(file) as new:
        new.write_text("{")
        raise ValueError
    assert read_json(file) == {"a": 1} and names(tmp_path) == ["a.json"]


def test_removing_hides_the_directory_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x").write_text("1")

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", die)
        remove_tree(tmp_path / "cache")
    assert not (tmp_path / "cache").exists() and len(names(tmp_path)) == 1
    remove_tree(tmp_path / "cache")
    assert names(tmp_path) == []


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """The lock file of a killed process means nothing; that of a living one names it."""
    lock = tmp_path / "work" / ".lock"
    with exclusive(lock, "the work directory", where=lock.parent), exclusive(lock, "again", where=lock.parent):
        child = os.fork()
        if child == 0:  # nothing of the parent's locks is in `_held` of another thread's name
            locks._held.clear()
            try:
                with exclusive(lock, "the work directory", where=lock.parent):
                    os._exit(0)
            except OutputError as error:
                says = str(error)
                os._exit(5 if f"process {os.getppid()}" in says and str(lock.parent) in says else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    assert names(tmp_path) == []
    lock.parent.mkdir()
    lock.write_text('{"pid": 1, "host": "x", "command": "killed"}')
    with exclusive(lock, "the work directory", where=lock.parent):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


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


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (269_060_552, "269.1 MB"), (10**13, "10000.0 GB")],
)
def test_human_bytes(count: int, shown: str) -> None:
    assert human_bytes(count) == shown
