"""A tiny base model with tokenizer and chat template, and a drafter for it: enough for whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engines import write_tokenizer
from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.cli import run_app

VOCAB = 259


def write_models(path: Path, **changes: Any) -> tuple[Path, Path]:
    """`base` (llama, 256 positions) and `drafter` (trained for 3 tokens) below `path`; `changes` go to the base."""
    base = write_base(path / "base", "llama", vocab_size=VOCAB, tie_word_embeddings=True, **changes)
    write_tokenizer(base)
    return base, write_drafter(path / "drafter", vocab_size=VOCAB, draft_len=3)


class Program:
    """Runs the program in this process and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        self._capsys.readouterr()
        code = run_app([str(a) for a in arguments])
        self.out, self.err = self._capsys.readouterr()
        return code

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document: the last line of stdout."""
        value: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return value
