"""The compiled library on disk: what is trusted, what is made again, what killed compilations leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.tiny import Program
from trtllm_redrafter.backends.torch.native import compiled, library
from trtllm_redrafter.backends.torch.native.compiled import (
    NativeUnavailable,
    cache_directory,
    check_cache,
    compiled_library,
    is_intact,
)

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("c++", "g++", "clang++")), reason="no C++ compiler: the PyTorch executor serves"
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
TINY = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a source that compiles at once."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "kernels.cpp").write_text(TINY)
    monkeypatch.setattr(compiled, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trtllm-redrafter" / "native"


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    real, made = compiled._compile, []

    def counted(compiler: str, target: Path) -> None:
        made.append(target)
        real(compiler, target)

    monkeypatch.setattr(compiled, "_compile", counted)
    return made


@needs_compiler
def test_compiled_once_and_for_this_user_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compilations(monkeypatch)
    path = compiled_library()
    assert path.parent == cache and is_intact(path) and compiled_library() == path and made == [path]
    assert [oct(p.stat().st_mode & 0o777) for p in (cache.parent, cache, path)] == ["0o700", "0o700", "0o600"]
    assert sorted(p.name for p in cache.iterdir()) == [path.name, path.name + ".sha256"]
    (compiled.SOURCES / "kernels.h").write_text("// one more\n")  # every source counts
    assert compiled_library() != path


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "no record", "writable", "link", "directory"])
def test_a_damaged_or_planted_library_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path = compiled_library()
    whole, record = path.read_bytes(), path.with_name(path.name + ".sha256")
    if damage == "cut":
        os.truncate(path, len(whole) // 2)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "changed":
        path.write_bytes(whole[:-1] + b"!")
    elif damage == "no record":
        record.unlink()
    elif damage == "writable":
        path.chmod(0o666)
    elif damage == "link":
        path.rename(cache / "elsewhere.so")
        path.symlink_to(cache / "elsewhere.so")
    else:
        record.unlink()
        record.mkdir()
        (record / "x").touch()
    made = compilations(monkeypatch)
    if damage == "directory":
        with pytest.raises(NativeUnavailable, match="could not be compiled"):
            compiled_library()
        return
    assert compiled_library() == path and made == [path] and is_intact(path) and not path.is_symlink()


@needs_compiler
@as_root
def test_a_library_of_another_user_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiled_library()
    os.chown(path, 12345, 12345)
    made = compilations(monkeypatch)
    assert compiled_library() == path and made == [path] and path.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("level", ["cache", "parent"])
def test_a_directory_that_others_can_write_to_is_refused(cache: Path, level: str) -> None:
    cache.mkdir(parents=True, mode=0o755)
    part = cache if level == "cache" else cache.parent
    part.chmod(0o777)
    with pytest.raises(NativeUnavailable, match="others can write to") as caught:
        check_cache()
    assert str(part) in str(caught.value) and f"chmod 700 {part}" in str(caught.value.remedy)
    part.chmod(0o755)
    other = part if level == "cache" else cache
    other.chmod(0o755)
    assert check_cache() == cache


@as_root
def test_a_directory_of_another_user_is_refused(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    os.chown(cache, 12345, 12345)
    with pytest.raises(NativeUnavailable, match="belongs to another user"):
        check_cache()


def test_a_link_or_file_in_its_place_is_refused(cache: Path, tmp_path: Path) -> None:
    cache.parent.mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    cache.symlink_to(tmp_path / "mine")
    with pytest.raises(NativeUnavailable, match="neither a file nor a directory"):
        check_cache()
    cache.unlink()
    cache.touch()
    with pytest.raises(NativeUnavailable, match="cannot be used"):
        check_cache()


@pytest.mark.parametrize("value", ["relative", "./here", ""])
def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_directory() == Path("/home/somebody/.cache/trtllm-redrafter/native")
    monkeypatch.setenv("HOME", "nowhere")
    with pytest.raises(NativeUnavailable, match="not absolute"):
        cache_directory()


@needs_compiler
def test_leftovers_of_killed_compilations_go(cache: Path) -> None:
    """Whether the next call compiles or not; a compilation that runs is left alone."""
    path = compiled_library()
    for name in ("build-999999-12ab", "tmpx1y2z3"):
        (cache / name).mkdir()
        (cache / name / "half.so").touch()
    assert compiled_library() == path
    assert sorted(p.name for p in cache.iterdir()) == [path.name, path.name + ".sha256"]
    (cache / "build-1-1").mkdir()
    path.unlink()
    compiled_library()
    assert not (cache / "build-1-1").exists()
    (cache / "build-2-2").mkdir()
    with compiled._lock(cache, wait=True) as alone:
        assert alone
        compiled_library()
        assert (cache / "build-2-2").exists()


@needs_compiler
def test_a_killed_compilation_is_no_harm(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's whole process group dies in the middle; the next process compiles and sweeps."""
    script = tmp_path / "slow-c++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\ntouch half.so\nkill -9 $PPID\n')
    script.chmod(0o755)
    code = (
        "from pathlib import Path; from trtllm_redrafter.backends.torch.native import compiled; "
        f"compiled.SOURCES = Path({str(compiled.SOURCES)!r}); compiled.compiled_library()"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "CXX": str(script)}, check=False)
    assert done.returncode == -9 and [p for p in cache.iterdir() if p.name.startswith("build-")]
    path = compiled_library()
    assert sorted(p.name for p in cache.iterdir()) == [path.name, path.name + ".sha256"]


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "_COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


def test_without_a_compiler_doctor_build_and_run_say_so(
    no_compiler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.engines import write_checkpoint, write_tokenizer

    sizes = {"hidden_size": 64, "intermediate_size": 96, "torch_dtype": "bfloat16", "head_dim": 16}
    checkpoint = write_checkpoint(tmp_path, vocab_size=259, **sizes)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    program, engine = Program(capsys), tmp_path / "engine"
    assert program("doctor", "--json") == 0
    found = next(c for c in program.document["checks"] if c["name"] == "native kernels")
    assert found["state"] == "warn" and "several times slower" in found["found"] and "g++" in found["remedy"]
    limits = ("--max-seq-len", 128, "--max-input-len", 64)
    assert program("build", "--checkpoint", checkpoint, "--output", engine, "--tokenizer", tokenizer, *limits) == 0
    slow = "note: bfloat16 runs through PyTorch here, several times slower than through the native kernels"
    assert program.err.count(slow) == 1 and "remedy: install g++, or set CXX" in program.err
    assert program("run", "--engine", engine, "--prompt", "a", "--prompt", "b", "--max-tokens", 2) == 0
    assert program.err.count(slow) == 1 and "no C++ compiler was found" in program.err


def test_what_a_user_chose_is_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFTER_NATIVE", "0")
    library.load_library.cache_clear()
    try:
        with pytest.raises(NativeUnavailable) as caught:
            library.load_library()
    finally:
        library.load_library.cache_clear()
    assert caught.value.note is None


@pytest.mark.parametrize(
    ("asked", "threads"), [("3", 3), ("257", 257), ("1000000", 1024), ("9" * 5000, 1024), ("0", None), ("²", None)]
)
def test_threads_are_bounded(monkeypatch: pytest.MonkeyPatch, asked: str, threads: int | None) -> None:
    monkeypatch.setenv("REDRAFTER_THREADS", asked)
    assert library.usable_cores() == (threads or min(len(os.sched_getaffinity(0)), library.MAX_THREADS))
