"""`chat`: each answer follows from the whole conversation, and what goes wrong in one turn stays in it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.cli.tiny import Program
from tests.engines import build_engine, write_checkpoint
from trtllm_redrafter import load_engine


@pytest.fixture
def talk(program: Program, artefacts: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    def run(lines: str, *options: object) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return program("chat", "--engine", artefacts / "engine", "--max-tokens", 5, *options)

    return run


def answers(engine: Path, questions: list[str], system: str | None = None) -> list[str]:
    """Each with all before it."""
    said = [] if system is None else [{"role": "system", "content": system}]
    texts = []
    with load_engine(engine) as loaded:
        for question in questions:
            said.append({"role": "user", "content": question})
            texts.append(loaded.generate(said, max_tokens=5)[0].text)
            said.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_answers_follow_from_the_conversation(talk, program: Program, artefacts: Path) -> None:  # type: ignore[no-untyped-def]
    assert talk("one\n\ntwo\n/stats\n") == 0
    assert program.out == "".join(f"{text}\n" for text in answers(artefacts / "engine", ["one", "two"]))
    assert "prompts      2" in program.err and "tokens per step" in program.err
    assert talk("one\n", "--system", "x") == 0
    assert program.out == answers(artefacts / "engine", ["one"], "x")[0] + "\n"


def test_what_was_said_can_be_taken_back(talk, program: Program, artefacts: Path) -> None:  # type: ignore[no-untyped-def]
    first, second = answers(artefacts / "engine", ["one", "two"])
    again = answers(artefacts / "engine", ["two"])[0]
    assert talk("one\ntwo\n/undo\ntwo\n/reset\ntwo\n/conjure\n/quit\nthree\n") == 0
    assert program.out == f"{first}\n{second}\n{second}\n{again}\n"
    assert "/conjure is none of the commands" in program.err


def test_a_question_that_is_refused_is_forgotten(talk, program: Program, artefacts: Path) -> None:  # type: ignore[no-untyped-def]
    first, second = answers(artefacts / "engine", ["one", "two"])
    assert talk(f"one\n{'word ' * 200}\ntwo\n", "--stats") == 0
    assert program.out == f"{first}\n{second}\n" and "turn 2" in program.err
    assert "2 read" not in program.err and program.err.count("acceptance") >= 2


def test_the_engine_needs_a_template(program: Program, tmp_path: Path) -> None:
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine")
    assert program("chat", "--engine", engine) == 2
    assert "no chat template" in program.err
