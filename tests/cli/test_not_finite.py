"""`run` on a model with one broken token: its prompt is an error of its own, the others are answered."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.tiny import Program, write_models


@pytest.mark.parametrize("flag", ["--no-draft", "--stats"])
def test_one_prompt_fails_and_the_others_are_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    base, drafter = write_models(tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # the damage is to what is read alone
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    broken = 3 + sorted(range(33, 127)).index(ord("x"))  # after three special tokens, the bytes' printable characters
    tensors["model.embed_tokens.weight"][broken] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    program, engine = Program(capsys), tmp_path / "engine"
    # Damage that came after the build: `convert` and `build` refuse such weights.
    checks = [
        f"trtllm_redrafter.{module}.non_finite_count" for module in ("conversion.sources", "checkpoint.structure")
    ]
    with patch(checks[0], return_value=0), patch(checks[1], return_value=0):
        assert program("convert", "--base", base, "--drafter", drafter, "--output", tmp_path / "ckpt") == 0
        assert program("build", "--checkpoint", tmp_path / "ckpt", "--output", engine) == 0
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab", "chat": false}\n{"prompt": "axb", "chat": false}\n')
    assert program("run", "--engine", engine, "--input", tmp_path / "p.jsonl", "--max-tokens", 3, flag, "--json") == 9
    document = program.document
    results = {r["id"]: r for r in document["results"]}
    assert document["error"]["kind"] == "numerical" and document["summary"]["failed"] == 1
    assert "line 2" in results["line-2"]["source"] and "are not finite" in results["line-2"]["error"]["what"]
    assert results["line-1"]["completion_tokens"] == 3
    assert program("run", "--engine", engine, "--prompt", "axb", "--no-chat", "--stream") == 9
