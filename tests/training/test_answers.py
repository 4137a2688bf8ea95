"""Answers written by the base model: right, resumable, and by whichever writer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.scratch import own_name
from trtllm_redrafter.training.answers import (
    TransformersWriter,
    WritingOptions,
    engine_writer,
    until_end,
    write_answers,
)
from trtllm_redrafter.training.frozen_base import FrozenBase

OPTIONS = WritingOptions(max_tokens=6, temperature=0.0, seed=1, batch=2)
PROMPTS = [[10], [20, 30], [40], [50, 60, 70], [80]]
SIZES: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "max_prompt": 30, "max_tokens": 60, "progress": no_progress
}  # fmt: skip


class Counting:
    """Answers with the numbers after the prompt's last; can break off."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at, self.asked = fail_at, 0

    def write(self, prompts: Sequence[Sequence[int]], options: WritingOptions, first: int) -> list[list[int]]:
        if first == self.fail_at:
            raise KeyboardInterrupt
        self.asked += len(prompts)
        return [[p[-1] + 1 + i for i in range(options.max_tokens)] for p in prompts]


def test_the_base_counts_on(counting_base: Path) -> None:
    writer = TransformersWriter(FrozenBase.load(counting_base, device="cpu", dtype="float32"))
    assert writer.write(PROMPTS, OPTIONS, 0) == Counting().write(PROMPTS, OPTIONS, 0)


def test_an_engine_writes_the_same(random_base: Path, tmp_path: Path) -> None:
    base = FrozenBase.load(random_base, device="cpu", dtype="float32")
    wanted = replace(OPTIONS, max_tokens=20)
    with engine_writer(random_base, tmp_path, batch=4, **SIZES) as writer:
        assert writer.write(PROMPTS, wanted, 0) == TransformersWriter(base).write(PROMPTS, wanted, 0)
        hot = replace(wanted, temperature=1.0)
        assert writer.write(PROMPTS[2:], hot, 2) == writer.write(PROMPTS, hot, 0)[2:]
    assert not list(tmp_path.iterdir())


def test_an_engine_that_a_kill_left_is_removed(random_base: Path, tmp_path: Path) -> None:
    """Also one half removed, without its manifest; what bears no such name is somebody's and stays."""
    left = tmp_path / own_name(".redrafter-engine") / "engine"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    (tmp_path / "base-engine").mkdir()
    (tmp_path / "base-engine" / "config.json").write_text("{}")
    with engine_writer(random_base, tmp_path, batch=1, **SIZES):
        assert not left.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["base-engine"]


def test_sampling_depends_on_the_seed(random_base: Path) -> None:
    writer = TransformersWriter(FrozenBase.load(random_base, device="cpu", dtype="float32"))
    hot = replace(OPTIONS, temperature=1.0, max_tokens=12)
    assert writer.write(PROMPTS, hot, 0) == writer.write(PROMPTS, hot, 0)
    assert writer.write(PROMPTS, hot, 0) != writer.write(PROMPTS, replace(hot, seed=2), 0)


@pytest.mark.parametrize("damage", [b"", b'{"answer": [1, 2'])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "work" / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_answers(PROMPTS, Counting(fail_at=2), OPTIONS, path, no_progress)
    with path.open("ab") as file:
        file.write(damage)
    writer = Counting()
    answers = write_answers(PROMPTS, writer, OPTIONS, path, no_progress)
    assert answers == Counting().write(PROMPTS, OPTIONS, 0)
    assert writer.asked == 3
    assert [json.loads(line)["answer"] for line in path.read_text().splitlines()[1:]] == answers
    again = Counting()
    assert write_answers(PROMPTS, again, OPTIONS, path, no_progress) == answers and again.asked == 0


def test_answers_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(PROMPTS, Counting(), OPTIONS, path, no_progress)
    with pytest.raises(InputError, match="holds the answers to other prompts or options"):
        write_answers(PROMPTS[:3], Counting(), OPTIONS, path, no_progress)


def test_an_answer_ends_with_its_first_end_token() -> None:
    assert until_end([5, 2, 7, 2], [2]) == [5, 2]
    assert until_end([5, 7], [2]) == [5, 7]


def test_an_engine_gets_several_batches_at_once(tmp_path: Path) -> None:
    class Sizes(Counting):
        batches_at_once = 2

        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        def write(self, prompts: Sequence[Sequence[int]], options: WritingOptions, first: int) -> list[list[int]]:
            self.sizes.append(len(prompts))
            return super().write(prompts, options, first)

    writer = Sizes()
    answers = write_answers(PROMPTS, writer, OPTIONS, tmp_path / "a.jsonl", no_progress)
    assert writer.sizes == [4, 1] and answers == Counting().write(PROMPTS, OPTIONS, 0)
