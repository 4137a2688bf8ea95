"""What a terminal gets to see: no escape sequences from outside, and no traceback for bytes that are not UTF-8."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.tiny import Program
from trtllm_redrafter.cli.console import printable, say_generated

EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202ereversed\x00\x7f\r"


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert printable(EVIL) == r"\x1b]0;owned\x07\x1b[31mred\x9b2J\u202ereversed\x00\x7f\x0d"
    assert printable("a\n\tb é 😀 \r\n") == "a\n\tb é 😀 \n"
    assert printable(os.fsdecode(b"/tmp/\xff")) == r"/tmp/\xff"
    assert printable("\ud83d") == r"\ud83d"


def test_generated_text_keeps_its_bytes_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say_generated(EVIL)
    assert capsys.readouterr().out == EVIL + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    say_generated(EVIL + " \n\t", end=False)
    assert capsys.readouterr().out == printable(EVIL) + " \n\t"


def test_ids_paths_and_prompts_are_shown_not_obeyed(program: Program, artefacts: Path, tmp_path: Path) -> None:
    lines = tmp_path / "p.jsonl"
    rows = [{"prompt": "a", "id": EVIL}, {"prompt": "b", "id": "two"}, {EVIL: 1}, {"prompt": "c", EVIL: 2}]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["run", "--engine", artefacts / "engine", "--max-tokens", 2]
    assert program(*run, "--input", lines, "--no-stream") == 3
    shown = program.out.partition("--- ")[2].partition("\n")[0] + program.err
    assert not any(c in shown for c in "\x1b\x9b\x07\u202e\x7f") and r"\x1b]0;owned" in shown
    assert program("run", "--engine", f"no{EVIL}".replace("\0", ""), "--prompt", "x") == 3
    assert "\x1b" not in program.err
    assert program(*run, "--input", lines, "--json") == 3
    assert program.document["results"][-1]["id"] and not any(c in program.out for c in "\x1b\x9b\u202e\x7f")


def test_bytes_that_are_not_utf8(artefacts: Path) -> None:
    program = [sys.executable, "-m", "trtllm_redrafter"]
    run = [*program, "run", "--engine", artefacts / "engine", "--max-tokens", "2"]
    cases = [
        ([*run, "--prompt", b"\xff"], "unicode string"),
        ([*run, "--input", b"\xff/none"], r"\xff/none"),
        ([*program, b"\xffcommand"], r"\xff"),
        ([*run, "--chat-template-kwargs", b"\xff=\xfe", "--prompt", "a"], "is not JSON"),
    ]
    for command, said in cases:
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        error = done.stderr.decode()
        assert (done.returncode, "Traceback" in error, "internal" in error) == (2, False, False), error
        assert said in error


def test_on_a_real_terminal(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text(
        "from trtllm_redrafter.cli.console import accept_all_text, note, say, say_generated\n"
        f"accept_all_text()\nsay({EVIL!r})\nnote({EVIL!r})\nsay_generated({EVIL!r})\n"
    )
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, script], stdin=theirs, stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert shown.count(rb"\x1b[31mred") == 3 and b"\x1b" not in shown and b"\x07" not in shown
