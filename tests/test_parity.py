"""Greedy parity finds what equal bytes cannot show, and calls rounding by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_models import FAMILIES, write_base, write_drafter
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.run import api
from trtllm_redrafter.verify.tokens import can_compare, greedy_parity


def checkpoint(tmp_path: Path, family: str, **changes: object) -> tuple[Path, Path]:
    base = write_base(tmp_path / "base", family, **changes)
    drafter = write_drafter(tmp_path / "drafter")
    return api.convert(base, tmp_path / "checkpoint", drafter=drafter, num_beams=3), base


@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_token_for_token_in_float32(tmp_path: Path, family: str) -> None:
    path, base = checkpoint(tmp_path, family)
    report = greedy_parity(path, base)
    assert (report.tokens.same, report.tokens.ties, report.problems) == (128, 0, ())


def test_an_engine_in_bfloat16_agrees_within_rounding(tmp_path: Path) -> None:
    path, base = checkpoint(tmp_path, "llama", torch_dtype="bfloat16")
    api.build(path, tmp_path / "engine", max_seq_len=96)
    report = greedy_parity(tmp_path / "engine", base)
    assert report.problems == () and report.tokens.same + report.tokens.ties == 128 and report.tokens.same > 96


def test_a_wrong_rotary_base_is_found(tmp_path: Path) -> None:
    path, base = checkpoint(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rotary_base": 3.0}))
    (path / "manifest.json").unlink()  # as another program would have written it; with ours, the hash would tell
    report = greedy_parity(path, base)
    assert report.problems and "the base model's is" in report.problems[0].render()
    assert "rounding in float32 explains" in report.problems[0].render()


def test_what_cannot_be_compared_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_config": {}, "build_config": {}}))
    assert "its GPU only" in (can_compare(tmp_path, tmp_path) or "")
    path, _ = checkpoint(tmp_path, "llama")
    assert can_compare(path, tmp_path / "base") is None
    with pytest.raises(InputError, match="transformers cannot load"):
        greedy_parity(path, tmp_path / "drafter")
