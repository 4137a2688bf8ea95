"""The pipeline on tiny models: what is planned, what is skipped, and why."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from tests.cli.tiny import write_models
from trtllm_redrafter.backends.engine_config import read_engine_config
from trtllm_redrafter.errors import InputError, OutputError, RedrafterError, UsageError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.run.stage_cache import Fingerprint, HashCache, fingerprint
from trtllm_redrafter.run.stages import PipelinePlan, plan_pipeline, run_pipeline
from trtllm_redrafter.settings import resolve, set_layer


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*changes: str) -> PipelinePlan:
    base = ["base=base", "drafter=drafter", "build.max_seq_len=128", "run.max_tokens=8"]
    return plan_pipeline(resolve([set_layer([*base, *changes])]), name="demo")


def run(*changes: str) -> dict[str, str]:
    return {stage.name: stage.status for stage in run_pipeline(plan(*changes), no_progress)}


def reasons(planned: PipelinePlan, stage: str) -> str:
    return next(s.render() for s in planned.stages if s.name == stage)


def test_a_plan_writes_nothing_and_waits_for_what_it_cannot_know(place: Path) -> None:
    planned = plan("run.prompts=[hi]")
    assert [(s.name, s.status, s.waits_for) for s in planned.stages] == [
        ("convert", "miss", None),
        ("build", "later", "convert"),
        ("run", "later", "convert"),
    ]
    text = planned.render()
    assert "it has not run before" in text and "rank0.safetensors" in text
    assert "build.max_input_len" in text and "derived from max_seq_len" in text
    assert sorted(p.name for p in place.iterdir()) == ["base", "drafter"]
    json.dumps(planned.as_dict())


def test_unchanged_stages_are_skipped(place: Path) -> None:
    assert run() == {"convert": "miss", "build": "miss"}
    made = (place / "runs/demo/checkpoint/rank0.safetensors").stat().st_mtime_ns
    assert run() == {"convert": "hit", "build": "hit"}
    assert (place / "runs/demo/checkpoint/rank0.safetensors").stat().st_mtime_ns == made
    assert run("convert.workers=2") == {"convert": "hit", "build": "hit"}


def test_an_option_of_one_stage_runs_that_stage(place: Path) -> None:
    run()
    planned = plan("build.max_batch_size=2")
    assert [s.status for s in planned.stages] == ["hit", "miss"]
    assert "build.max_batch_size was 8, is 2" in reasons(planned, "build")
    assert run("build.max_batch_size=2") == {"convert": "hit", "build": "miss"}


def test_a_change_of_the_checkpoint_reaches_the_engine(place: Path) -> None:
    run()
    planned = plan("convert.num_beams=2")
    assert "convert.num_beams was null, is 2" in reasons(planned, "convert")
    assert run("convert.num_beams=2") == {"convert": "miss", "build": "miss"}
    shape = read_engine_config(place / "runs/demo/engine").draft_shape
    assert shape is not None and shape.num_beams == 2


def test_an_equal_checkpoint_written_again_needs_no_new_engine(place: Path) -> None:
    """The engine follows from the checkpoint's content, not from when it was written."""
    run()
    shutil.rmtree(place / "runs/demo/checkpoint")
    planned = plan()
    assert "does not exist" in reasons(planned, "convert")
    assert run() == {"convert": "miss", "build": "hit"}


def test_other_input_content_is_a_miss_and_other_dates_are_not(place: Path) -> None:
    run()
    weights = place / "base/model.safetensors"
    os.utime(weights, (time.time() - 100, time.time() - 100))
    assert run() == {"convert": "hit", "build": "hit"}
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "base/model.safetensors has other content" in reasons(plan(), "convert")
    (place / "base/extra.json").write_text("{}")
    assert "base/extra.json is new" in reasons(plan(), "convert")


def test_a_drafter_taken_away(place: Path) -> None:
    run()
    assert "drafter/config.json is gone" in reasons(plan("drafter=null"), "convert")


@pytest.mark.parametrize("damage", ["cut", "lose", "edit"])
def test_a_damaged_output_is_made_again(place: Path, damage: str) -> None:
    run()
    weights = place / "runs/demo/checkpoint/rank0.safetensors"
    if damage == "cut":
        data = weights.read_bytes()
        weights.unlink()  # the engine holds a hard link to it
        weights.write_bytes(data[:-1])
    elif damage == "lose":
        weights.unlink()
    else:
        manifest = weights.parent / "manifest.json"
        manifest.write_text(manifest.read_text().replace("trtllm-redrafter", "trtllm-redrafter", 1) + "\n")
    assert plan().stages[0].status == "miss"
    assert run()["convert"] == "miss"
    assert run() == {"convert": "hit", "build": "hit"}


def test_a_stranger_in_the_outputs_place_is_not_replaced(place: Path) -> None:
    (place / "runs/demo/checkpoint").mkdir(parents=True)
    (place / "runs/demo/checkpoint/letter.txt").write_text("keep me")
    with pytest.raises(OutputError, match="exists already"):
        plan()
    assert (place / "runs/demo/checkpoint/letter.txt").read_text() == "keep me"


def test_a_stranger_who_comes_after_the_plan_is_not_replaced_either(place: Path) -> None:
    planned = plan()
    (place / "runs/demo/checkpoint").mkdir(parents=True)
    (place / "runs/demo/checkpoint/manifest.json").write_text('{"creator": {"name": "trtllm-redrafter"}}')
    with pytest.raises(OutputError, match="exists already"):
        list(run_pipeline(planned, no_progress))


def test_a_failed_stage_leaves_no_record(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise InputError("no more electricity")

    planned = plan()
    with monkeypatch.context() as patch:
        patch.setattr("trtllm_redrafter.run.stages.convert", fail)
        with pytest.raises(InputError):
            list(run_pipeline(planned, no_progress))
    assert not (place / "runs").exists()
    assert run() == {"convert": "miss", "build": "miss"}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (["base=null"], UsageError, "base=DIR is not given"),
        (["base=nowhere"], InputError, "directory does not exist"),
        (["base=drafter", "build.max_seq_len=null"], InputError, "a drafter, not a base model"),
        (["drafter=nowhere"], InputError, "nowhere"),
        (["run.input=none.jsonl"], InputError, "none.jsonl"),
        (["run.max_tokens=128"], UsageError, "leaves no room for a prompt"),
        (["drafter=null", "run.num_beams=2"], UsageError, "there is no drafter"),
        (["convert.num_beams=51"], RedrafterError, "num_beams is 51"),
        (["convert.draft_len=9"], RedrafterError, "draft_len is 9"),
    ],
)
def test_refused_before_anything_is_written(
    place: Path, changes: list[str], error: type[RedrafterError], text: str
) -> None:
    with pytest.raises(error, match=text):
        plan(*changes)
    assert not (place / "runs").exists()


def test_broken_records_are_a_miss_not_an_error(place: Path) -> None:
    run()
    for file in (place / "runs/demo/.stages").iterdir():
        file.write_text("{")
    with pytest.raises(OutputError):  # without its record the output could be anyone's
        plan()


def test_hash_cache_reads_a_settled_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text("{}")
    os.utime(file, (1.0e9, 1.0e9))
    cache = HashCache(tmp_path / "cache" / "hashes.json")
    first = cache.sha256(file)
    cache.save()
    monkeypatch.setattr("trtllm_redrafter.run.stage_cache.sha256_file", lambda _: "read again")
    again = HashCache(tmp_path / "cache" / "hashes.json")
    assert again.sha256(file) == first
    file.write_text("[]")  # same size, fresh date
    assert again.sha256(file) == "read again"


def test_fingerprints_ignore_order() -> None:
    one = Fingerprint({"a": 1, "b": 2}, {"x": "1", "y": "2"})
    two = Fingerprint({"b": 2, "a": 1}, {"y": "2", "x": "1"})
    assert one.key == two.key and not one.changes_since(two.options, two.inputs)
    assert one.changes_since({"a": 1, "b": 3}, {"x": "1"}) == ["b was 3, is 2", "y is new"]


def test_a_pickled_drafter_with_other_weights_is_a_miss(place: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(place / "drafter" / "model.safetensors")
    (place / "drafter" / "model.safetensors").unlink()
    for factor, expected in ((1.0, "miss"), (1.0, "hit"), (-3.0, "miss")):
        if expected == "miss":
            torch.save({k: v * factor for k, v in tensors.items()}, place / "drafter" / "pytorch_model.bin")
        assert run()["convert"] == expected
    checkpoint = load_file(place / "runs/demo/checkpoint/rank0.safetensors")
    assert torch.equal(checkpoint["drafter.rnn_u.bias"], tensors["rnn_u.bias"] * -3.0)


@pytest.mark.parametrize("name", ["base/sub/model-2.safetensors", "base/added_tokens.json", "drafter/model.pt"])
def test_whatever_a_stage_may_read_is_in_its_fingerprint(name: str, place: Path) -> None:
    before = fingerprint("convert", plan().resolved, HashCache(place / "none.json"))
    file = place / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    after = fingerprint("convert", plan().resolved, HashCache(place / "none.json"))
    assert set(after.inputs) - set(before.inputs) == {name}


@pytest.mark.parametrize("name", ["base/pytorch_model.bin", "base/README.md", "base/.cache/x.json"])
def test_files_that_no_stage_reads_change_nothing(name: str, place: Path) -> None:
    before = fingerprint("convert", plan().resolved, HashCache(place / "none.json"))
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_bytes(b"x")
    assert fingerprint("convert", plan().resolved, HashCache(place / "none.json")) == before


def test_the_draft_length_in_a_drafters_name_is_an_input(place: Path) -> None:
    (place / "drafter").rename(place / "d_n_2_x")
    short = fingerprint("convert", plan("drafter=d_n_2_x").resolved, HashCache(place / "none.json"))
    (place / "d_n_2_x").rename(place / "d_n_3_x")
    longer = fingerprint("convert", plan("drafter=d_n_3_x").resolved, HashCache(place / "none.json"))
    assert short.key != longer.key


def test_a_file_changed_behind_its_old_date_is_read_again(place: Path) -> None:
    file = place / "a.json"
    file.write_text("1")
    os.utime(file, (1.0e9, 1.0e9))
    cache = HashCache(place / "hashes.json")
    first = cache.sha256(file)
    time.sleep(0.02)
    file.write_text("2")
    os.utime(file, (1.0e9, 1.0e9))
    assert cache.sha256(file) != first


def test_every_key_of_a_section_shapes_its_stage_unless_it_is_named(place: Path) -> None:
    options = fingerprint("convert", plan().resolved, HashCache(place / "none.json")).options
    assert {"convert.dtype", "convert.tp_size", "convert.num_beams", "convert.greedy"} <= set(options)
    assert "convert.workers" not in options
    run()
    compiled = plan().resolved.derive({"backend": "tensorrt"}, "by this test")
    options = fingerprint("build", compiled, HashCache(place / "none.json")).options
    assert options["tensorrt_llm.gpu"] == "h100-80gb" and "tensorrt.compiler" in options
    assert "tensorrt.executor" not in options and "tensorrt_llm.version" not in options
