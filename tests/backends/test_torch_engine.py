"""Engine directories: what is in them, what is checked, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines import build_engine, build_options, load, write_checkpoint, write_tokenizer
from tests.tiny_models import write_base
from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.engine_config import engine_backend
from trtllm_redrafter.backends.torch.backend import TorchBackend
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.errors import BackendError, InputError, MismatchError, OutputError, RedrafterError, UsageError
from trtllm_redrafter.redrafter.config import DraftShape


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_an_engine_is_complete(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 64)
    engine = build_engine(checkpoint, tmp_path / "engine", tokenizer)
    manifest = Manifest.read(engine)
    assert manifest.kind == "engine"
    present = {p.relative_to(engine).as_posix() for p in engine.rglob("*") if p.is_file()}
    assert set(manifest.files) == present - {"manifest.json"}
    assert {"config.json", "checkpoint/rank0.safetensors", "tokenizer/tokenizer.json"} <= present
    assert manifest.check_files(engine, hashes=True) == []
    assert manifest.inputs["checkpoint"]["inputs"]["base"]
    info = load(engine).info
    assert (info.max_batch_size, info.max_input_len, info.max_seq_len) == (4, 100, 200)
    assert info.draft_shape == DraftShape(4, 3)


def test_weights_are_linked_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    engine = build_engine(checkpoint, tmp_path / "engine")
    same = (engine / "checkpoint/rank0.safetensors").samefile(checkpoint / "rank0.safetensors")
    assert same


def test_the_plan_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    plan = TorchBackend().plan(build_options(checkpoint, tmp_path / "engine"))
    assert not (tmp_path / "engine").exists()
    assert "4 beams x 3 tokens" in plan.render()
    assert json.dumps(plan.as_dict())
    # 2 layers x keys and values x 2 KV heads x 8 x (200 + 13) positions x 4 requests x 4 bytes
    assert plan.kv_cache_bytes == 2 * 2 * 2 * 8 * 213 * 4 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_len": 300}, "max_seq_len 300 exceeds the model's 256 positions"),
        ({"max_input_len": 200}, "leaves no room to write"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
    ],
)
def test_limits_are_checked(checkpoint: Path, tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        TorchBackend().plan(build_options(checkpoint, tmp_path / "engine", **changes))


def test_existing_output_needs_overwrite(checkpoint: Path, tmp_path: Path) -> None:
    engine = build_engine(checkpoint, tmp_path / "engine")
    with pytest.raises(OutputError, match="the output exists already"):
        build_engine(checkpoint, engine)
    build_engine(checkpoint, engine, overwrite=True)


def test_tokenizer_directory_without_one(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no tokenizer here"):
        TorchBackend().plan(build_options(checkpoint, tmp_path / "engine", tmp_path))


def test_an_interrupted_build_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    plan = TorchBackend().plan(build_options(checkpoint, tmp_path / "engine"))
    monkeypatch.setattr("trtllm_redrafter.backends.torch.backend._manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        TorchBackend().build(plan, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_not_an_engine(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)this is a checkpoint, not an engine.*run `trtllm-redrafter build"):
        load(checkpoint)


def test_a_model_is_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is a Hugging Face model, not an engine"):
        load(write_base(tmp_path / "base"))
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_an_engine_of_the_other_backend(tmp_path: Path) -> None:
    config = {"version": "1.2.1", "pretrained_config": {}, "build_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert engine_backend(tmp_path) == "tensorrt-llm"
    with pytest.raises(BackendError, match="built for the tensorrt-llm backend"):
        load(tmp_path)


def test_unknown_backend() -> None:
    with pytest.raises(UsageError, match="no backend 'onnx'"):
        load_backend("onnx")


def test_another_format_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    engine = build_engine(checkpoint, tmp_path / "engine")
    config = json.loads((engine / "config.json").read_text())
    (engine / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(BackendError, match="format 99"):
        load(engine)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_files_are_found(tmp_path: Path, damage: str) -> None:
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine")
    weights = engine / "checkpoint/rank0.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(content[:-10])
    elif damage == "flipped":
        weights.write_bytes(content)
    with pytest.raises(RedrafterError, match="rank0"):
        load(engine)


def test_a_damaged_checkpoint_is_not_built(tmp_path: Path) -> None:
    """Else the engine's new manifest would vouch for the flipped bit."""
    checkpoint = write_checkpoint(tmp_path)
    weights = checkpoint / "rank0.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="content has changed since the checkpoint was written"):
        build_engine(checkpoint, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine", max_batch_size=10**9)
    with pytest.raises(BackendError, match="not enough memory for the KV cache"):
        load(engine)


def test_draft_shape_can_be_changed_at_load(checkpoint: Path, tmp_path: Path) -> None:
    engine = build_engine(checkpoint, tmp_path / "engine")
    assert load(engine, DraftShape(2, 5)).info.draft_shape == DraftShape(2, 5)
    with pytest.raises(UsageError, match="num_beams is 51"):
        load(engine, DraftShape(51, 2))


def test_no_draft_shape_without_a_drafter(tmp_path: Path) -> None:
    engine = build_engine(write_checkpoint(tmp_path, drafter=False), tmp_path / "engine")
    with pytest.raises(UsageError, match="no drafter"):
        load(engine, DraftShape(2, 2))


def test_devices(checkpoint: Path, tmp_path: Path) -> None:
    engine = build_engine(checkpoint, tmp_path / "engine")
    with pytest.raises(UsageError, match="'tpu9' is not a device"):
        TorchBackend().load(engine, device="tpu9", verify_hashes=False)
