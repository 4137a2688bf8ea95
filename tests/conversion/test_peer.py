"""Our conversion against NVIDIA's exporter, file for file and byte for byte."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.conversion.conftest import Convert
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.verify.files import verify_files
from trtllm_redrafter.verify.weights import verify

PEER = Path(os.environ.get("REDRAFTER_PEER_DIR") or Path(__file__).parents[1] / "data" / "peer")
INDEX: dict[str, dict[str, Any]] = json.loads((PEER / "index.json").read_text())
PLAIN = [name for name, entry in INDEX.items() if entry["quantization"] == "none"]

EXPORTER_ONLY = {
    "producer", "share_embedding_table", "residual_mlp", "bias", "rotary_pct", "rank", "decoder", "rmsnorm",
    "lm_head_bias",
}  # fmt: skip
"""Keys of the exporter's fallback writer that TensorRT-LLM does not need; docs/checkpoint.md has the reasons."""
DIFFERENT = {"logits_dtype"}


@pytest.mark.parametrize("name", PLAIN)
def test_hugging_face_to_checkpoint(name: str, run: Convert) -> None:
    entry = INDEX[name]
    assert entry["pp_size"] == 1
    ours = run(PEER / "hf" / entry["hf"], dtype=entry["dtype"], tp_size=entry["tp_size"], parallel_embedding=True).path
    for rank in range(entry["tp_size"]):
        file = f"rank{rank}.safetensors"
        compare_tensors(ours / file, PEER / "expected" / name / file)
        assert (ours / file).read_bytes() == (PEER / "expected" / name / file).read_bytes()
    mine = json.loads((ours / "config.json").read_text())
    theirs = json.loads((PEER / "expected" / name / "config.json").read_text())
    differing = {key for key, value in theirs.items() if mine.get(key) != value}
    assert differing <= EXPORTER_ONLY | DIFFERENT
    assert mine["logits_dtype"] == "float32"


def compare_tensors(ours: Path, theirs: Path) -> None:
    """Name, dtype, shape and bytes of each tensor, so that a difference says where it is."""
    a, b = SafetensorsFile.open(ours), SafetensorsFile.open(theirs)
    assert sorted(a) == sorted(b)
    raw_a, raw_b = ours.read_bytes(), theirs.read_bytes()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert raw_a[a[name].begin : a[name].end] == raw_b[b[name].begin : b[name].end], name


@pytest.mark.parametrize("name", sorted(set(INDEX) - set(PLAIN)))
def test_quantized_checkpoints_pass_through(name: str, run: Convert) -> None:
    entry = INDEX[name]
    ours = run(PEER / "expected" / name, tp_size=entry["tp_size"], parallel_embedding=True).path
    for rank in range(entry["tp_size"]):
        file = f"rank{rank}.safetensors"
        assert (ours / file).read_bytes() == (PEER / "expected" / name / file).read_bytes()
    theirs = json.loads((PEER / "expected" / name / "config.json").read_text())
    mine = json.loads((ours / "config.json").read_text())
    assert {key: mine[key] for key in theirs} == theirs


@pytest.mark.parametrize("name", INDEX)
def test_the_exporters_checkpoints_pass_our_checks(name: str) -> None:
    report = verify_files(PEER / "expected" / name, hashes=True)
    assert report.ok, report.render()


@pytest.mark.parametrize("name", PLAIN)
def test_the_exporters_values_are_those_of_the_model(name: str) -> None:
    report = verify(
        PEER / "expected" / name, against=PEER / "hf" / INDEX[name]["hf"], hashes=False, progress=no_progress
    )
    assert report.ok and any("bit for bit" in check for check in report.checks)


@pytest.mark.parametrize("name", PLAIN)
def test_files_open_with_the_safetensors_library(name: str, run: Convert) -> None:
    entry = INDEX[name]
    ours = run(PEER / "hf" / entry["hf"], tp_size=entry["tp_size"]).path
    with safe_open(ours / "rank0.safetensors", "pt") as file:
        assert "transformer.ln_f.weight" in list(file.keys())
