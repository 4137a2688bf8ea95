"""The model of `make test-gpu` on the torch backend: rounding leaves its tokens alone, and a wrong layer does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from tests.decisive_models import SIZES, successors, write_decisive_checkpoint
from tests.engines import build_engine, load
from trtllm_redrafter.backends.base import Request, Result, SamplingParams
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.verify.gate import GateRequest, parity_gate
from trtllm_redrafter.verify.reference import Text, reference_logits
from trtllm_redrafter.verify.token_checks import TokenCheck, check_tokens

PROMPTS = ((79, 8, 130), (200,), (45, 46, 47, 48, 49, 50, 51), (3, 250, 17, 91))
LIMITS = {"max_input_len": 100, "max_seq_len": 200}
MLP, QUERIES = "model.layers.0.mlp.", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_decisive_checkpoint(tmp_path_factory.mktemp("intact")))


def compared(folder: Path, intact: Checkpoint, results: list[Result]) -> TokenCheck:
    texts = [Text(tuple(p), tuple(r.token_ids)) for p, r in zip(PROMPTS, results, strict=True)]
    return check_tokens(folder, reference_logits(intact, texts, "cpu"), results)


def decoded(folder: Path, fault: Callable[[dict[str, Tensor]], None] | None = None) -> list[Result]:
    runner = load(build_engine(write_decisive_checkpoint(folder, fault=fault), folder / "engine", **LIMITS))
    return runner.generate([Request(prompt, SamplingParams(64, ignore_eos=True)) for prompt in PROMPTS])


def swap_gate_and_up(tensors: dict[str, Tensor]) -> None:
    gate, up = MLP + "gate_proj.weight", MLP + "up_proj.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def shift_query_heads(tensors: dict[str, Tensor]) -> None:
    tensors[QUERIES] = tensors[QUERIES].roll(64, 0)


def test_bfloat16_keeps_the_tokens(tmp_path: Path, intact: Checkpoint) -> None:
    results = decoded(tmp_path)
    check = compared(tmp_path, intact, results)
    assert not check.faults and check.ties <= 5 and check.same + check.ties == 256
    follows = successors(SIZES["vocab_size"])
    pairs = [pair for r in results for pair in zip(r.token_ids, r.token_ids[1:], strict=False)]
    elsewhere = sum(int(follows[a]) != b for a, b in pairs)
    assert 5 < elsewhere < 60, "the context decides now and then"
    assert all(2.0 < (r.acceptance_length or 0.0) < 4.0 for r in results)


@pytest.mark.parametrize("fault", [swap_gate_and_up, shift_query_heads])
def test_a_wrong_layer_shows(tmp_path: Path, intact: Checkpoint, fault: Callable[[dict[str, Tensor]], None]) -> None:
    check = compared(tmp_path, intact, decoded(tmp_path, fault))
    assert len(check.faults) == len(PROMPTS) and check.same < 150


def test_it_passes_the_parity_gate(tmp_path: Path) -> None:
    from tests.engines import write_tokenizer

    checkpoint = write_decisive_checkpoint(tmp_path)
    engine = build_engine(checkpoint, tmp_path / "engine", write_tokenizer(tmp_path / "tokenizer"), **LIMITS)
    report = parity_gate(GateRequest(engine, checkpoint, ("one", "the second"), 64, None, "cpu"))
    assert report.ok, report.render()
