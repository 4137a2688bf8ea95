"""Plans: pure, complete, and telling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conversion.conftest import Options
from tests.engines import write_tokenizer
from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.progress import no_progress


def test_a_plan_writes_nothing_and_says_exactly_what_comes(tmp_path: Path, options: Options) -> None:
    base, drafter = write_base(tmp_path / "base"), write_drafter(tmp_path / "drafter")
    plan = plan_conversion(options(base, drafter, tp_size=2))
    assert not (tmp_path / "out").exists()
    text, document = plan.render(), plan.as_dict()
    json.dumps(document)
    out = convert(plan, no_progress)
    for entry in document["writes"]:
        assert (out / entry["file"]).stat().st_size == entry["bytes"]
    assert json.loads((out / "config.json").read_text()) == document["config"]
    recorded = json.loads((out / "manifest.json").read_text())["derived"]
    assert recorded == {key: document["derived"][key] for key in ("eos_token_ids", "trained_draft_len")}
    for part in ("rank1.safetensors", "max_tree_tokens", "26", "ReDrafterForLLaMALM", str(drafter)):
        assert part in text


@pytest.mark.parametrize(
    ("name", "stated", "asked", "expected", "note"),
    [
        ("d", 4, (None, None), (5, 4), "draft_len 4: draft_len in the drafter's config.json"),
        ("run_n_3_lr_0.001_layers_2", None, (None, None), (5, 3), "draft_len 3: the drafter's directory name"),
        ("run_n_3", None, (None, 2), (5, 2), "num_beams 5: the default of NVIDIA's converter"),
        ("d", None, (None, None), (5, 5), "draft_len 5: the default of NVIDIA's converter"),
        ("d", None, (None, 9), (5, 9), "does not say how far ahead it was trained; draft_len 9 is not checked"),
        ("d", 4, (2, 1), (2, 1), ""),
    ],
)
def test_where_the_draft_shape_comes_from(
    name: str, stated: int | None, asked: tuple[int | None, int | None], expected: tuple[int, int], note: str,
    tmp_path: Path, options: Options,
) -> None:  # fmt: skip
    base, drafter = write_base(tmp_path / "base"), write_drafter(tmp_path / name, draft_len=stated)
    plan = plan_conversion(options(base, drafter, num_beams=asked[0], draft_len=asked[1]))
    shape = plan.config.draft_shape
    assert shape is not None and (shape.num_beams, shape.draft_len) == expected
    assert note in plan.render()


def test_num_beams_may_come_from_the_drafter(tmp_path: Path, options: Options) -> None:
    base, drafter = write_base(tmp_path / "base"), write_drafter(tmp_path / "drafter", num_beams=2)
    plan = plan_conversion(options(base, drafter))
    assert plan.config.draft_shape is not None and plan.config.draft_shape.num_beams == 2
    assert "num_beams 2: the drafter's config.json" in plan.render()


def test_notes_on_casts_tokenizers_and_sampling(tmp_path: Path, options: Options) -> None:
    base = write_base(tmp_path / "base", torch_dtype="float16")
    drafter = write_drafter(tmp_path / "drafter", base_model={"tokenizer_sha256": "0" * 64})
    text = plan_conversion(options(base, drafter, dtype="bfloat16", greedy=False)).render()
    assert "weights stored as F16 are cast to bfloat16" in text
    assert "no tokenizer files" in text
    assert "changes the distribution" in text
    write_tokenizer(base, 96)
    text = plan_conversion(options(base, drafter)).render()
    assert "no tokenizer files" not in text and "trained with another tokenizer" in text


def test_progress_ends_at_its_total(tmp_path: Path, options: Options) -> None:
    base = write_base(tmp_path / "base")
    calls: list[tuple[str, int, int | None, str]] = []
    plan = plan_conversion(options(base, tp_size=2))
    convert(plan, lambda *call: calls.append(call))
    last = {stage: (done, total, unit) for stage, done, total, unit in calls}
    assert last["convert"] == (plan.weight_bytes, plan.weight_bytes, "bytes")
    assert last["hash inputs"][0] == last["hash inputs"][1]


def test_manifests_of_earlier_versions_are_read(tmp_path: Path, options: Options) -> None:
    """They repeated config.json's values, and the tokenizer's hash, in `derived`."""
    base, drafter = write_base(tmp_path / "base"), write_drafter(tmp_path / "drafter", draft_len=4)
    plan = plan_conversion(options(base, drafter))
    out = convert(plan, no_progress)
    written = Manifest.read(out)
    assert written.trained_draft_len == 4 and "num_beams" not in written.derived
    replace(written, derived=plan.derived).write(out)
    again = Manifest.read(out)
    assert again.derived["num_beams"] == 5 and again.intact
    assert (again.trained_draft_len, again.end_tokens) == (written.trained_draft_len, written.end_tokens)
    assert again.tokenizer_sha256 == written.tokenizer_sha256
