"""The cache holds what the base computes, costs what the plan says, and is never used when it is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from trtllm_redrafter.errors import OutputError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.training.cache import (
    ARRAYS,
    Cache,
    CachePlan,
    cache_key,
    check_space,
    open_or_build,
    plan_cache,
    weights_fingerprint,
)
from trtllm_redrafter.training.data import TokenizedText
from trtllm_redrafter.training.frozen_base import FrozenBase, base_identity

TEXTS = [
    TokenizedText((1, 5, 6, 7, 8), ((2, 5),)),
    TokenizedText((9, 10, 11, 12, 13, 14, 15), ((1, 3), (5, 7))),
    TokenizedText((20, 21), ((1, 2),)),
]


@dataclass
class Setting:
    base: FrozenBase
    folder: Path
    computed: int = 0

    def open(self, texts: list[TokenizedText] = TEXTS) -> Cache:
        plan = plan_cache(texts, 32, "float32")
        key = cache_key(texts, base_identity(self.base.path), weights_fingerprint(self.base.path), "float32")
        return open_or_build(self.folder, texts, self.base, plan, key, batch_tokens=8, progress=no_progress)


@pytest.fixture
def setting(random_base: Path, tmp_path: Path) -> Setting:
    return Setting(FrozenBase.load(random_base, device="cpu", dtype="float32"), tmp_path / "cache")


def test_rows_are_the_bases_own_states(setting: Setting) -> None:
    rows = setting.open().rows
    assert rows.tokens.tolist() == [6, 7, 8, 10, 11, 14, 15, 21]
    assert rows.document.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    before = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 4), (1, 5), (2, 0)]  # (text, position of the state)
    for row, (text, position) in enumerate(before):
        [states] = setting.base.hidden([TEXTS[text].token_ids])
        torch.testing.assert_close(rows.hidden[row], states[position], atol=1e-5, rtol=1e-5)


def test_it_is_computed_once(setting: Setting) -> None:
    assert setting.open().made == "there is none"
    assert setting.open().made is None


def test_the_plan_knows_its_size(setting: Setting, random_base: Path) -> None:
    texts = [TokenizedText(tuple(range(3, 103)), ((10, 100),)) for _ in range(40)]
    setting.open(texts)
    used = sum(p.stat().st_size for p in setting.folder.iterdir())
    planned = plan_cache(texts, 32, "float32").total_bytes
    assert abs(used - planned) <= 0.05 * planned


@pytest.mark.parametrize("name", ARRAYS)
def test_a_flipped_bit_is_found_and_mended(setting: Setting, name: str) -> None:
    whole = setting.open().rows.hidden.clone()
    content = bytearray((setting.folder / name).read_bytes())
    content[5] ^= 4
    (setting.folder / name).write_bytes(content)
    mended = setting.open()
    assert mended.made == f"{name} is damaged: its hash has changed"
    assert torch.equal(mended.rows.hidden, whole)
    assert setting.open().made is None


def test_other_damage_is_found(setting: Setting) -> None:
    setting.open()
    with (setting.folder / "tokens.bin").open("ab") as file:
        file.write(b"1234")
    assert setting.open().made == "tokens.bin has 36 bytes instead of 32"
    (setting.folder / "manifest.json").write_text("{")
    assert "it is damaged" in str(setting.open().made)
    (setting.folder / "manifest.json").unlink()
    assert setting.open().made == "it was not finished"
    assert setting.open(TEXTS[:2]).made == "it was made from other texts, or by another model"


def test_a_full_disk_is_refused_first(tmp_path: Path) -> None:
    plan = CachePlan(rows=10**15, documents=1, hidden_size=4096, dtype="bfloat16", forward_tokens=1)
    with pytest.raises(OutputError, match="the disk cannot hold the hidden states"):
        check_space(tmp_path / "cache", plan)
    assert not (tmp_path / "cache").exists()
