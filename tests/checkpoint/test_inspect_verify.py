"""What is this, and is it intact? Every way a checkpoint can be wrong is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.checkpoint.manifest import Manifest, record_tree
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.run import api
from trtllm_redrafter.verify.files import verify_files
from trtllm_redrafter.verify.inspect import inspect
from trtllm_redrafter.verify.weights import verify

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    base = write_base(tmp_path / "base", "qwen3", torch_dtype="bfloat16")
    options = ConvertOptions(
        base=base, drafter=write_drafter(tmp_path / "drafter", exit_dim=48), output=tmp_path / "checkpoint",
        dtype="auto", tp_size=2, num_beams=4, draft_len=3, greedy=True, parallel_embedding=False, workers=1,
        overwrite=False,
    )  # fmt: skip
    return convert(plan_conversion(options), no_progress)


def change(path: Path, edit: Callable[[Tensors], None], rank: int = 1) -> None:
    """Edit a rank file and bring the manifest in line, so that only the structure can tell."""
    file = path / f"rank{rank}.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    replace(Manifest.read(path), files=record_tree(path)).write(path)


def test_an_intact_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    report = verify(checkpoint, against=tmp_path / "base", hashes=True, progress=no_progress)
    assert report.ok and len(report.checks) == 3
    assert "all checks passed" in report.render()
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True


def test_a_flipped_bit(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "rank1.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4
    file.write_bytes(raw)
    assert verify_files(checkpoint, hashes=False).ok
    report = verify_files(checkpoint, hashes=True)
    assert [p.what for p in report.problems] == ["the file's content has changed"]
    assert "rank1.safetensors: the file's content has changed" in report.render()


def test_values_that_are_not_the_models(checkpoint: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["transformer.layers.1.mlp.proj.weight"][3, 4] += 0.5

    change(checkpoint, edit)
    assert verify_files(checkpoint, hashes=True).ok
    report = verify(checkpoint, against=tmp_path / "base", hashes=True, progress=no_progress)
    assert [p.what for p in report.problems] == ["tensor 'transformer.layers.1.mlp.proj.weight' differs from the model"]
    assert "rank1.safetensors" in str(report.problems[0].where)


def test_another_model(checkpoint: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", "qwen3", torch_dtype="bfloat16", rope_theta=5e5)
    report = verify(checkpoint, against=other, hashes=False, progress=no_progress)
    assert [p.what for p in report.problems] == ["rotary_base is 10000.0, the model's is 500000.0"]


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, make: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, make(tensors))


STRUCTURE: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no drafter head": (drop("drafter.lm_head.weight"), "'drafter.lm_head.weight' is missing"),
    "no norm": (drop("transformer.ln_f.weight"), "'transformer.ln_f.weight' is missing"),
    "dtype": (
        put("drafter.rnn_u.bias", lambda t: t["drafter.rnn_u.bias"].to(torch.float16)),
        "'drafter.rnn_u.bias' has the wrong dtype",
    ),
    "shape": (put("lm_head.weight", lambda t: torch.zeros(96, 32).bfloat16()), "'lm_head.weight' has the wrong shape"),
    "surplus": (put("drafter.rnn_w.bias", lambda t: torch.zeros(2)), "'drafter.rnn_w.bias' does not belong"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_structure(case: str, checkpoint: Path) -> None:
    edit, message = STRUCTURE[case]
    change(checkpoint, edit)
    report = verify_files(checkpoint, hashes=True)
    assert len(report.problems) == 1
    assert message in report.problems[0].what and "rank1.safetensors" in str(report.problems[0].where)
    assert report.problems[0].remedy


def test_a_drafter_that_would_be_quantized(checkpoint: Path) -> None:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    config["quantization"] = {"quant_algo": "W8A16", "exclude_modules": ["lm_head"]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    report = verify_files(checkpoint, hashes=False)
    assert any("not excluded from quantization" in p.what for p in report.problems)


@pytest.mark.parametrize("name", ["rank0.safetensors", "config.json"])
def test_a_missing_file_is_a_problem_not_a_crash(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    report = verify_files(checkpoint, hashes=True)
    assert any(name in str(p.where) for p in report.problems)


def test_a_manifest_of_someone_else(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"kind": "web app"}')
    assert "not a manifest written by this program" in verify_files(checkpoint, hashes=True).render()


def test_a_changed_manifest(checkpoint: Path) -> None:
    """A flipped bit in a text of the manifest leaves it readable; its own hash tells."""
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"tp_size": ', '"tp_sizf": ', 1))
    report = verify_files(checkpoint, hashes=True)
    assert [p.what for p in report.problems] == ["the manifest has been changed since it was written"]
    values = json.loads(path.read_text())
    del values["manifest_sha256"]  # one of an earlier version
    path.write_text(json.dumps(values))
    assert verify_files(checkpoint, hashes=True).ok


def test_a_manifest_that_names_files_outside(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["../base/config.json"] = {"size": 1, "sha256": ""}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert "leads outside" in verify_files(checkpoint, hashes=True).render()


def test_an_engine_is_verified_through_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(checkpoint, engine / "checkpoint")
    (engine / "config.json").write_text(json.dumps({"backend": "torch", "build_config": {"max_batch_size": 1}}))
    Manifest("engine", {}, {}, {}, record_tree(engine)).write(engine)
    report = verify(engine, against=tmp_path / "base", hashes=True, progress=no_progress)
    assert report.ok, report.render()
    found = inspect(engine)
    assert found.kind == "engine of the torch backend" and len(found.tensors) > 50
    change(engine / "checkpoint", drop("transformer.ln_f.weight"))
    assert "ln_f.weight' is missing" in verify_files(engine, hashes=False).render()


# ---- inspect


def test_what_an_engine_drafts_is_shown(checkpoint: Path, tmp_path: Path) -> None:
    """It is in the config of the engine's checkpoint alone."""
    config = json.loads((checkpoint / "config.json").read_text())
    drafts = {"num_beams": config["redrafter_num_beams"], "draft_len": config["redrafter_draft_len_per_beam"]}
    engine = api.build(checkpoint, tmp_path / "engine", max_seq_len=64)
    assert inspect(engine).facts["draft"] == drafts
    (engine / "checkpoint" / "config.json").unlink()
    assert "not known" in inspect(engine).facts["draft"]


def test_files_that_nobody_wrote_are_named(checkpoint: Path, tmp_path: Path) -> None:
    api.build(checkpoint, tmp_path / "engine", max_seq_len=64)
    for path in (checkpoint, tmp_path / "engine"):
        assert verify_files(path, hashes=True).ok
        (path / "tokenizer").mkdir(exist_ok=True)
        (path / "tokenizer" / "evil.py").write_text("print('never')")
        (path / "link").symlink_to(tmp_path)
        report = verify_files(path, hashes=True)
        assert [p.what for p in report.problems] == ["an unknown file that may be read, or run"] * 2
        assert [p.where for p in report.problems] == [str(path / "link"), str(path / "tokenizer" / "evil.py")]
    for number in range(30):
        (checkpoint / f"file{number:02d}.py").touch()
    assert verify_files(checkpoint, hashes=True).problems[-1].what == "and 20 more problems like these"


def test_inspect_names_everything(checkpoint: Path, tmp_path: Path) -> None:
    for path, kind in (
        (checkpoint, "TensorRT-LLM checkpoint with drafter"),
        (tmp_path / "base", "Hugging Face model"),
        (tmp_path / "drafter", "drafter"),
        (checkpoint / "rank0.safetensors", "safetensors file"),
    ):
        found = inspect(path)
        assert found.kind == kind
        assert found.total_bytes == sum(row.nbytes for row in found.tensors) > 0
        json.dumps(found.as_dict())
        assert str(path) in found.render()


def test_inspect_folds_layers_and_shows_provenance(checkpoint: Path, tmp_path: Path) -> None:
    text = inspect(checkpoint).render()
    assert "transformer.layers.*.mlp.fc.weight  BF16 [24, 32] x 2 layers in 2 files" in text
    assert str(tmp_path / "base") in text and "redrafter_num_beams" in text and "trtllm-redrafter" in text
    assert len(text.splitlines()) < 60


def test_inspect_of_a_pickled_drafter(tmp_path: Path) -> None:
    assert "pickle" in inspect(write_drafter(tmp_path / "pt", file="model.pt")).render()


@pytest.mark.parametrize("content", ["{}", '{"a": 1}'])
def test_inspect_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="not a model, drafter"):
        inspect(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        inspect(tmp_path / "nowhere")


# ---- what verify says of files nobody lists, and without a manifest


def test_unlisted_files_are_named(checkpoint: Path) -> None:
    (checkpoint / "README").write_text("mine")
    (checkpoint / "modeling.py").write_text("raise SystemExit")
    (checkpoint / "tokenizer").mkdir(exist_ok=True)
    (checkpoint / "tokenizer" / "added_tokens.json").write_text("{}")
    report = verify_files(checkpoint, hashes=False)
    assert [Path(str(p.where)).name for p in report.problems] == ["modeling.py", "added_tokens.json"]
    assert all("unknown file" in p.what for p in report.problems)
    assert any("README" in note for note in report.notes)


def test_without_a_manifest_verify_says_what_it_cannot_know(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    report = verify_files(checkpoint, hashes=True)
    assert report.ok and "every value is finite" in report.render()
    for text in ("complete and unchanged", "which base model and drafter", "exchanged", "--against"):
        assert text in report.notes[0]


@pytest.mark.parametrize(
    ("key", "value"), [("notes", 5), ("files", {"a": {"size": -1, "sha256": ""}}), ("inputs", []), ("kind", "web app")]
)
def test_manifests_of_the_wrong_shape(key: str, value: object, checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    report = verify_files(checkpoint, hashes=True)
    assert "not a manifest written by this program" in report.render() and key in report.render()
