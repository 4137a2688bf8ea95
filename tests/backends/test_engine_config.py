"""Engines and checkpoints that were edited, or are another program's: refused when they are opened, by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engines import build_engine, load, write_checkpoint
from trtllm_redrafter.backends.engine_config import parse_engine_config, read_engine_config
from trtllm_redrafter.checkpoint.manifest import Manifest, record_tree
from trtllm_redrafter.checkpoint.safetensors_io import save_tensors
from trtllm_redrafter.errors import BackendError, InputError, RedrafterError
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.verify.files import verify_files

WHERE = Path("engine")
LIMITS = {"max_batch_size": 2, "max_input_len": 40, "max_seq_len": 64}
MODEL = {"vocab_size": 96, "redrafter_num_beams": 2, "redrafter_draft_len_per_beam": 3}
TORCH = {"format": 2, "backend": "torch", "build_config": LIMITS, "draft_head_rows": 9}
FIRST = TORCH | {"format": 1, "draft": {"num_beams": 2, "draft_len": 3, "head_rows": 9}}
TENSORRT = {"version": "1.2.1", "pretrained_config": MODEL, "build_config": LIMITS}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(config))
    *folders, last = path.split(".")
    holder = copy
    for folder in folders:
        holder = holder[folder]
    if value is KeyError:
        del holder[last]
    else:
        holder[last] = value
    return copy


@pytest.mark.parametrize(
    ("config", "path", "value"),
    [
        (TORCH, "build_config.max_batch_size", 0),
        (TORCH, "build_config.max_batch_size", "2"),
        (TORCH, "build_config.max_seq_len", 2**40),
        (TORCH, "build_config", 5),
        (TORCH, "draft_head_rows", -1),
        (FIRST, "draft.head_rows", KeyError),
        (FIRST, "draft", 5),
        (TENSORRT, "pretrained_config.vocab_size", KeyError),
        (TENSORRT, "pretrained_config.mapping", {"world_size": 10**9}),
        (TENSORRT, "pretrained_config.redrafter_draft_len_per_beam", 2**63),
        (TENSORRT, "build_config.max_seq_len", 6),
        (TENSORRT, "build_config", []),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], path: str, value: Any) -> None:
    found = parse_engine_config(config, MODEL, WHERE)
    assert found.draft_shape == DraftShape(2, 3) and found.head_rows == (0 if config is TENSORRT else 9)
    with pytest.raises(InputError) as e:
        parse_engine_config(changed(config, path, value), MODEL, WHERE)
    assert path.rpartition(".")[2].removeprefix("redrafter_").removesuffix("_per_beam") in str(e.value)


def test_another_format() -> None:
    with pytest.raises(BackendError, match="format 3, this version reads 2"):
        parse_engine_config(TORCH | {"format": 3}, MODEL, WHERE)


@pytest.mark.parametrize(
    ("key", "value"), [("redrafter_num_beams", 51), ("redrafter_draft_len_per_beam", 1_000_000), ("vocab_size", "9")]
)
def test_models_that_are_refused(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=key.removeprefix("redrafter_").removesuffix("_per_beam")) as e:
        parse_engine_config(TORCH, MODEL | {key: value}, WHERE)
    assert e.value.problem.where == str(Path("engine/checkpoint/config.json"))


def test_an_engine_of_the_first_format_still_runs(tmp_path: Path) -> None:
    """Its config.json repeats the draft shape of its checkpoint, and holds the head's rows in the same section."""
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine")
    config = json.loads((engine / "config.json").read_text())
    assert "num_beams" not in json.dumps(config)
    del config["draft_head_rows"]
    config |= {"format": 1, "draft": {"num_beams": 4, "draft_len": 3, "head_rows": 64}, "built_on": {"machine": "x"}}
    (engine / "config.json").write_text(json.dumps(config))
    Manifest("engine", {}, {}, {}, record_tree(engine)).write(engine)
    found = read_engine_config(engine)
    assert found.draft_shape == DraftShape(4, 3) and found.head_rows == 64
    assert load(engine).info.draft_shape == DraftShape(4, 3)


def test_the_config_is_opened_once(tmp_path: Path) -> None:
    """From the recipe's checks to the loaded engine."""
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine")
    program = """if True:
        import sys
        from trtllm_redrafter import load_engine
        opened = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        load_engine(sys.argv[1], num_beams=2, device="cpu").close()
        print(opened.count(sys.argv[1] + "/config.json"))
    """
    done = subprocess.run([sys.executable, "-c", program, str(engine)], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def resize(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "rank0.safetensors")
        tensors[name] = edit(tensors[name]).contiguous()
        save_tensors(checkpoint / "rank0.safetensors", tensors)

    return apply


def configure(**changes: Any) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | changes))

    return apply


FAULTS = {
    "narrow": (resize("transformer.layers.0.mlp.fc.weight", lambda t: t[:, :8]), "mlp.fc.weight' has the wrong shape"),
    "dtype": (resize("transformer.ln_f.weight", lambda t: t.half()), "ln_f.weight' has the wrong dtype"),
    "intermediate": (configure(intermediate_size=96), "mlp.fc.weight' has the wrong shape"),
    "layers": (configure(num_hidden_layers=3), "transformer.layers.2.input_layernorm.weight' is missing"),
    "beyond reason": (configure(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "draft length": (
        configure(redrafter_draft_len_per_beam=2**63),
        "redrafter_draft_len_per_beam is 92233720",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_build_and_load_check_a_checkpoint_as_verify_does(fault: str, with_manifest: bool, tmp_path: Path) -> None:
    edit, message = FAULTS[fault]
    checkpoint = write_checkpoint(tmp_path, dtype="bfloat16")
    engine = build_engine(checkpoint, tmp_path / "engine")
    copy = engine / "checkpoint" / "rank0.safetensors"
    for folder in (checkpoint, engine / "checkpoint"):
        if folder != checkpoint:
            data = copy.read_bytes()
            copy.unlink()  # a hard link of the checkpoint's
            copy.write_bytes(data)
        else:
            data = (checkpoint / "rank0.safetensors").read_bytes()
            (checkpoint / "rank0.safetensors").unlink()
            (checkpoint / "rank0.safetensors").write_bytes(data)
        edit(folder)
    if not with_manifest:
        (checkpoint / "manifest.json").unlink()
    else:
        old = Manifest.read(checkpoint)
        Manifest(old.kind, old.inputs, old.options, old.derived, record_tree(checkpoint)).write(checkpoint)
    Manifest("engine", {}, {}, {}, record_tree(engine)).write(engine)
    assert message in verify_files(checkpoint, hashes=True).render()
    for act in (lambda: build_engine(checkpoint, tmp_path / "other"), lambda: load(engine)):
        with pytest.raises(RedrafterError) as e:
            act()
        assert message in str(e.value)
    assert not (tmp_path / "other").exists()


def test_limits_that_do_not_fit_the_model(tmp_path: Path) -> None:
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine")
    config = json.loads((engine / "config.json").read_text())
    config["build_config"]["max_seq_len"] = 10**8
    (engine / "config.json").write_text(json.dumps(config))
    Manifest("engine", {}, {}, {}, record_tree(engine)).write(engine)
    with pytest.raises(InputError, match="limits do not fit its model"):
        load(engine)


def test_a_cache_larger_than_the_machine(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, max_position_embeddings=2**30)
    engine = build_engine(checkpoint, tmp_path / "engine", max_seq_len=2**30, max_batch_size=2**20)
    with pytest.raises(BackendError, match="not enough memory for the KV cache"):
        load(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(dtype: str, value: float, tmp_path: Path) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    checkpoint = write_checkpoint(tmp_path, dtype=dtype)
    resize("drafter.lm_head.weight", spoil)(checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"'drafter.lm_head.weight' has 1 value\(s\) that are not finite"):
        build_engine(checkpoint, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    assert "not finite" in verify_files(checkpoint, hashes=True).render()


def test_every_file_of_an_engine_follows_the_umask(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, dtype="bfloat16", hidden_size=16, vocab_size=96)
    tensors = load_file(checkpoint / "rank0.safetensors")
    product = tensors["lm_head.weight"].float() @ torch.randn(16, 32)
    tensors["drafter.lm_head.weight"] = product.bfloat16()  # of low rank: a factor is written
    save_tensors(checkpoint / "rank0.safetensors", tensors)
    (checkpoint / "manifest.json").unlink()
    old = os.umask(0o027)
    try:
        engine = build_engine(checkpoint, tmp_path / "engine")
    finally:
        os.umask(old)
    assert (engine / "draft_head_factor.safetensors").exists()
    written = [p for p in engine.rglob("*") if p.is_file() and p.stat().st_nlink == 1]
    assert len(written) >= 3 and {p.stat().st_mode & 0o777 for p in written} == {0o640}
