"""`train` and `evaluate` as a user runs them, down to text from the drafter that was just made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.tiny import Program
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.run.options import within
from trtllm_redrafter.settings import resolve
from trtllm_redrafter.settings.values import parse_grid

TEXTS = ["the quick brown fox jumps over the lazy dog", "one two three four five six seven eight nine ten"] * 4


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "the quick", "category": "animals"}, {"prompt": "one two", "category": "numbers"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


SMALL = (
    "--draft-len", 3, "--num-layers", 1, "--max-steps", 4, "--set", "train.window=16", "--set", "train.windows=2",
    "--set", "train.full_windows=1", "--set", "train.grid=1x2,2x3", "--set", "train.draft_vocab=100",
    "--set", "train.held_out=0.3", "--set", "train.warmup_steps=1",
)  # fmt: skip


def test_from_text_to_a_drafter_to_text(program: Program, models: Path, texts: Path, prompts: Path) -> None:
    work = texts.parent
    base, drafter = models / "base", work / "drafter"
    train = ["train", "--base", base, "--data", texts, "--output", drafter, "--work-dir", work / "work", *SMALL]
    assert program(*train, "--plan", "--json") == 0
    assert program.document["plan"]["steps"] == 4
    assert not drafter.exists() and not (work / "work").exists()
    assert program(*train, "--json") == 0
    assert program.document["metrics"]["steps"] == 4
    config = json.loads((drafter / "config.json").read_text())
    assert (config["draft_len"], config["num_draft_layers"], config["tie_lm_head"]) == (3, 1, True)

    evaluate = ["evaluate", "--base", base, "--drafter", drafter, "--prompts", prompts, "--max-tokens", 16]
    assert program(*evaluate, "--json") == 0
    settings = [a["setting"] for a in program.document["acceptance"]]
    assert settings == ["1x3", "2x3"], "the default grid keeps to the drafter's three tokens"
    assert program(*evaluate, "--min-acceptance", 3.9) == 8
    assert "3.9 was asked for" in program.err

    assert program("convert", "--base", base, "--drafter", drafter, "--output", work / "checkpoint") == 0
    assert program("build", "--checkpoint", work / "checkpoint", "--output", work / "engine") == 0
    assert program("run", "--engine", work / "engine", "--prompt", "the", "--max-tokens", 8, "--json") == 0
    assert program.document["results"][0]["completion_tokens"] == 8


def test_prompts_alone_are_answered_by_an_engine_of_the_base(
    program: Program, models: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers is not asked; the answers are the base model's greedy ones and stay in the work directory."""

    def refuse(*_: object) -> None:
        raise AssertionError("transformers was asked to write")

    monkeypatch.setattr("trtllm_redrafter.training.answers.TransformersWriter.write", refuse)
    work = prompts.parent
    train = ["train", "--base", models / "base", "--prompts", prompts, "--output", work / "drafter", *SMALL]
    settings = ["--set", "train.max_answer_tokens=20", "--set", "train.held_out=0", "--work-dir", work / "work"]
    assert program(*train, *settings) == 0
    answers = [json.loads(line) for line in (work / "work" / "answers.jsonl").read_text().splitlines()]
    assert len([a for a in answers if "answer" in " ".join(a)]) == 2
    assert not (work / "work" / "base-engine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--base is not given"),
        (["evaluate"], "--prompts is not given"),
        (["train", "--base", "BASE", "--output", "new"], "exactly one of data and prompts is needed"),
        (["train", "--base", "BASE", "--output", "new", "--head", "huge"], "train.head is huge"),
        (["train", "--base", "BASE", "--output", "new", "--epochs", "1", "--max-steps", "2"], "both given"),
        (["evaluate", "--grid", "4y4"], "'4y4' is not BEAMSxLENGTH"),
    ],
)
def test_refusals(program: Program, models: Path, arguments: list[str], message: str) -> None:
    assert program(*[models / "base" if a == "BASE" else a for a in arguments]) == 2
    assert message in program.err
    assert "Traceback" not in program.err


def test_grids() -> None:
    grid = parse_grid("1x3, 4x4,8x5")
    assert grid == (DraftShape(1, 3), DraftShape(4, 4), DraftShape(8, 5))
    assert within(grid, 4) == grid[:2]
    assert within(grid, 2) == (DraftShape(1, 2),)
    assert parse_grid(resolve([]).recipe.train.grid)
