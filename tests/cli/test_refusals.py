"""What the program says to bad input: file or option, cause, remedy; an exit code by kind; no traceback, no output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.tiny import Program
from trtllm_redrafter.cli.console import printable


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path, artefacts: Path) -> Path:
    """An empty working directory with links to the tiny models and artefacts beside it."""
    work = tmp_path / "work"
    work.mkdir()
    for target in (models / "base", models / "drafter", artefacts / "checkpoint", artefacts / "engine"):
        (tmp_path / target.name).symlink_to(target)
    monkeypatch.chdir(work)
    return work


CONVERT = "convert --base ../base --drafter ../drafter --output out"
BUILD = "build --checkpoint ../checkpoint --output out"
RUN = "run --engine ../engine"

REFUSALS = [
    # command line, exit code, what must be said
    ("convert", 2, ["--base is not given", "--output is not given", "set `base`"]),
    ("build", 2, ["--checkpoint is not given", "--output is not given"]),
    ("run --prompt x", 2, ["--engine is not given"]),
    ("build --checkpoint ../checkpoint --output ../checkpoint --overwrite", 2, ["overlaps the checkpoint directory"]),
    ("build --checkpoint ../checkpoint --output ../checkpoint/engine", 2, ["overlaps the checkpoint directory"]),
    ("build --checkpoint ../engine --output out", 3, ["this is an engine, not a checkpoint"]),
    ("build --checkpoint ../drafter --output out", 3, ["this is a drafter, not a checkpoint"]),
    ("convert --base ../drafter --output out", 3, ["this is a drafter, not a base model"]),
    ("convert --base ../base/config.json --output out", 3, ["../base/config.json", "not a directory"]),
    ("convert --base ../base --output ../drafter/config.json/x", 5, ["where a directory of the output should be"]),
    (f"convert --base ../base --output {'x' * 300}", 5, ["the name of the output is too long"]),
    (f"{CONVERT} --num-beam 3", 2, ["No such option", "--num-beam", "convert --help"]),
    (f"{CONVERT} --tp-size two", 2, ["--tp-size", "integer", "convert --help"]),
    (f"{CONVERT} --tp-size 0", 2, ["flag --tp-size", "convert.tp_size is 0", "greater than or equal to 1"]),
    (f"{CONVERT} --dtype bf16", 2, ["flag --dtype", "convert.dtype is bf16", "'bfloat16'"]),
    (f"{CONVERT} --num-beams 51", 4, ["num_beams is 51", "--num-beams"]),
    (f"{CONVERT} --draft-len 4", 4, ["draft_len is 4", "trained for 3", "use at most 3"]),
    (f"{CONVERT} --num-beams 60 --draft-len 9", 4, ["num_beams is 60", "draft_len is 9"]),
    ("convert --base ../nowhere --output out", 3, ["../nowhere"]),
    (f"{BUILD} --backend onnx", 2, ["flag --backend", "backend is onnx"]),
    (f"{BUILD} --max-seq-len 5000", 4, ["max_seq_len 5000", "256 positions", "--max-seq-len 256"]),
    (f"{BUILD} --max-seq-len 64 --max-input-len 64", 4, ["max_input_len 64", "leaves no room"]),
    (f"{BUILD} --tokenizer ../drafter", 3, ["no tokenizer", "../drafter"]),
    ("build --checkpoint ../base --output out", 3, ["../base", "not a checkpoint"]),
    ("build --checkpoint ../nowhere --output out", 3, ["../nowhere", "does not exist"]),
    (RUN, 7, ["the list of prompts is empty", "--prompt TEXT or --input FILE.jsonl"]),
    ("run --engine ../checkpoint --prompt x", 3, ["this is a checkpoint, not an engine", "build --checkpoint"]),
    ("run --engine ../nowhere --prompt x", 3, ["does not exist", "../nowhere"]),
    ("run --engine ../base --prompt x", 3, ["not an engine", "../base"]),
    (f"{RUN} --prompt x --temperature -1", 2, ["flag --temperature", "run.temperature is -1.0"]),
    (f"{RUN} --prompt x --temperature nan", 2, ["run.temperature is nan"]),
    (f"{RUN} --prompt x --top-p 1.5", 2, ["flag --top-p", "less than or equal to 1"]),
    (f"{RUN} --prompt x --max-tokens 0", 2, ["flag --max-tokens", "run.max_tokens is 0"]),
    (f"{RUN} --prompt x --num-beams 51", 2, ["num_beams is 51, more than 50"]),
    (f"{RUN} --prompt x --max-tokens 500", 7, ["exceed the engine's 128", "prompt 1"]),
    (f"{RUN} --prompt {'x' * 150}", 7, ["prompt tokens"]),
    (f"{RUN} --prompt= --no-chat", 2, ["flag --prompt", "run.prompts"]),
    (f"{RUN} --input none.jsonl", 3, ["none.jsonl", "does not exist"]),
    (f"{RUN} --input ../base", 3, ["../base", "a directory, not a file"]),
    (f"{RUN} --prompt x --output ../base --overwrite", 5, ["../base", "is a directory"]),
    (f"{RUN} --input ../base/config.json --output ../base/config.json --overwrite", 2, ["erase the prompts"]),
    (f"{RUN} --prompt x --device abacus", 2, ["run.device is abacus", "auto, cpu, cuda or cuda:N"]),
    (f"{RUN} --prompt x --device meta", 2, ["run.device is meta"]),
    (f"{RUN} --prompt x --draft-len 4", 2, ["draft_len is 4", "trained for 3"]),
    (f"{RUN} --prompt x --output ../engine", 5, ["exists already", "--overwrite"]),
    ("pipeline none.yaml", 3, ["none.yaml", "cannot read the recipe"]),
    ("inspect ../nowhere", 3, ["../nowhere", "no such directory"]),
    ("verify ../nowhere", 3, ["../nowhere", "does not exist"]),
    ("verify ../base", 3, ["../base", "neither a checkpoint nor an engine"]),
    ("verify ../checkpoint/config.json", 3, ["a file, not a directory"]),
    ("verify ../checkpoint --against ../nowhere", 3, ["../nowhere"]),
    ("convertt", 2, ["No such command", "convertt"]),
]


@pytest.mark.parametrize(("line", "code", "texts"), REFUSALS, ids=[line for line, _, _ in REFUSALS])
def test_refused(here: Path, program: Program, line: str, code: int, texts: list[str]) -> None:
    assert program(*line.split(" "), "--json") == code, program.err
    said = " ".join(program.err.split())
    assert all(text in said for text in texts), said
    assert "Traceback" not in said
    document = program.document
    if "ok" in document and not document["ok"] and "error" in document:
        assert document["error"]["exit_code"] == code and document["error"]["what"] in said
    assert list(here.iterdir()) == []


def test_everything_wrong_with_a_recipe_comes_in_one_message(here: Path, program: Program) -> None:
    Path("demo.yaml").write_text("base: ../base\nconvert: {num_beam: 4, dtype: bf16}\nrun: {top_k: many}\n")
    assert program("pipeline", "demo.yaml", "--set", "bild.max_seq_len=1", "--json") == 2
    for text in ("did you mean 'convert.num_beams'", "dtype is bf16", "run.top_k is many", "unknown key 'bild'"):
        assert text in program.err
    assert len(program.document["error"]["problems"]) == 4
    assert [p.name for p in here.iterdir()] == ["demo.yaml"]


def test_a_tensorrt_engine_of_another_program(here: Path, program: Program) -> None:
    Path("engine").mkdir()
    limits = {"max_batch_size": 4, "max_input_len": 64, "max_seq_len": 128}
    config = {"pretrained_config": {"vocab_size": 96}, "build_config": limits}
    Path("engine/config.json").write_text(json.dumps(config))
    assert program("run", "--engine", "engine", "--prompt", "x") == 3
    assert "not built by this program" in program.err and "build --backend tensorrt-llm" in program.err


@pytest.mark.parametrize("damage", ["cut", "lost", "bits"])
def test_a_damaged_engine(here: Path, program: Program, damage: str) -> None:
    shutil.copytree("../engine", "engine")
    weights = Path("engine/checkpoint/rank0.safetensors")
    data = bytearray(weights.read_bytes())
    if damage == "lost":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(data[:-7])
    else:
        data[-1] ^= 1
        weights.write_bytes(data)
    flags = ["--verify"] if damage == "bits" else []
    assert program("run", "--engine", "engine", "--prompt", "x", *flags) == 3
    assert "rank0.safetensors" in program.err and "remedy" in program.err
    if damage == "bits":  # sizes are always checked, contents on request
        assert program("run", "--engine", "engine", "--prompt", "x", "--max-tokens", "2") == 0


def test_results_on_a_full_disk(here: Path, program: Program) -> None:
    """/dev/full takes nothing; a device is no file of ours, so it is reached through a link."""
    Path("full.jsonl").symlink_to("/dev/full")
    assert program(*RUN.split(), "--prompt", "x", "--output", "full.jsonl", "--overwrite", "--json") == 5, program.err
    assert "full.jsonl: the disk is full" in program.err and program.document["error"]["kind"] == "output"


def test_debug_shows_where_it_happened(here: Path, program: Program) -> None:
    assert program("inspect", "../nowhere", "--debug") == 3
    assert "Traceback" in program.err and "error: " in program.err


def test_a_bug_ends_in_a_message_too(here: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> None:
        raise ZeroDivisionError("one over nothing")

    monkeypatch.setattr("trtllm_redrafter.verify.inspect.inspect", broken)
    assert program("inspect", "../engine", "--json") == 70
    assert "internal error: ZeroDivisionError: one over nothing" in program.err and "--debug" in program.err
    assert program.document["error"]["kind"] == "internal"
    assert program("inspect", "../engine", "--debug") == 70 and "Traceback" in program.err


def test_interrupted(here: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trtllm_redrafter.conversion.writer.convert", stop)
    assert program(*CONVERT.split(), "--json") == 130
    assert "interrupted" in program.err and list(here.iterdir()) == []
    assert program.document["error"]["kind"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_in_a_message_and_leave_nothing(here: Path, number: signal.Signals) -> None:
    """The signal strikes while the output is half written, and comes out of a library as another exception."""
    script = f"""
import os, signal, sys
import trtllm_redrafter.conversion.writer as writer
from trtllm_redrafter.cli import main
def write_ranks(plan, work, progress):
    (work / "half").write_text("written")
    try:
        os.kill(os.getpid(), {number.value})
    except KeyboardInterrupt:
        raise AttributeError("half imported") from None
writer._write_ranks = write_ranks
sys.argv[1:] = {CONVERT.split()!r} + ["--json"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 128 + number and done.stderr.endswith("interrupted\n"), done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == 128 + number
    assert list(here.iterdir()) == []


def test_names_from_files_reach_a_terminal_as_escapes(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "red\x1b[31m\u202e"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["\\u001b]0;title\\u0007"]}')
    assert program("convert", "--base", folder, "--output", tmp_path / "out") == 3
    assert "\x1b" not in program.err and "red\\x1b[31m\\u202e" in program.err and "\\x1b]0;title\\x07" in program.err
    assert program("inspect", folder) == 0 and "\x1b" not in program.out
    assert printable("ä\ttab\n" + os.fsdecode(b"\xff")) == "ä\ttab\n\\xff"


def test_paths_that_are_not_utf8(program: Program, tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"base\xff")
    name.mkdir()
    assert program("convert", "--base", name, "--output", tmp_path / "out", "--json") == 2
    assert "UTF-8" in program.err and program.document["error"]["kind"] == "usage"
    assert program("inspect", name, "--json") == 3 and "base\\xff" in program.err


def test_long_names_of_inputs(program: Program) -> None:
    for line in (
        f"convert --base {'x' * 300} --output y",
        f"run --engine {'x' * 300} --prompt a",
        f"inspect {'x' * 300}",
    ):
        assert program(*line.split()) == 3, program.err
        assert "error:" in program.err


def test_too_little_memory_is_said_before_anything_is_imported() -> None:
    """Below the address space that PyTorch needs, imports fail in the middle and differently each time."""
    limited = "ulimit -v 600000; exec " + sys.executable + " -m trtllm_redrafter inspect ."
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=60)
    assert done.returncode == 6 and "not enough memory" in done.stderr and "Traceback" not in done.stderr


def test_an_allocation_that_fails_anywhere(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("trtllm_redrafter.verify.inspect.inspect", fail)
    assert program("inspect", ".") == 6 and "not enough memory" in program.err
