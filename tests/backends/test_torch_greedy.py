"""Greedy output is transformers' own, token for token, for every family, sharding and rotary scaling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines import VOCAB, build_engine, load, make_runner, with_oracle, write_checkpoint
from tests.tiny_models import FAMILIES, LINEAR_ROPE, LLAMA3_ROPE
from trtllm_redrafter.backends.base import Request, SamplingParams
from trtllm_redrafter.redrafter.config import DraftShape

PROMPTS = ((5, 9, 23, 7), (3,), (11, 60, 2, 44, 31, 17, 8, 9, 10))


def reference(base: Path, prompt: Sequence[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers(tmp_path: Path, family: str, tp_size: int) -> None:
    runner = make_runner(tmp_path, family, tp_size=tp_size, tie_word_embeddings=tp_size == 2)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    plain = runner.generate([Request(p, sampling, draft=False) for p in PROMPTS])
    real = runner.generate([Request(p, sampling) for p in PROMPTS])
    truth = {p: r.token_ids for p, r in zip(PROMPTS, plain, strict=True)}
    good = with_oracle(runner, truth, DraftShape(4, 3)).generate([Request(p, sampling) for p in PROMPTS])
    for prompt, *results in zip(PROMPTS, plain, real, good, strict=True):
        expected = reference(tmp_path / "base", prompt, 40)
        for result in results:
            assert result.token_ids[: len(expected)] == expected
    for result in good:
        assert result.acceptance_length is not None and 1.5 < result.acceptance_length < 4
        assert len(result.token_ids) == 1 + result.steps + result.accepted_tokens
        assert result.accepted_tokens == sum(result.accepted_per_position)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(tmp_path: Path, family: str) -> None:
    runner = make_runner(tmp_path, family, tp_size=2)
    prompt = list(range(3, 40))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(runner.executor.prefill(0, prompt).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaling", [LLAMA3_ROPE, LINEAR_ROPE], ids=["llama3", "linear"])
def test_rotary_scaling(tmp_path: Path, scaling: dict[str, object]) -> None:
    runner = make_runner(tmp_path, "llama", rope_scaling=scaling)
    prompt = [i % VOCAB for i in range(7, 97)]
    result = runner.generate([Request(tuple(prompt), SamplingParams(max_tokens=60, ignore_eos=True))])[0]
    expected = reference(tmp_path / "base", prompt, 60)
    assert result.token_ids[: len(expected)] == expected


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}], ids=["bias", "head"]
)
def test_llama_variants(tmp_path: Path, changes: dict[str, object]) -> None:
    runner = make_runner(tmp_path, "llama", **changes)
    result = runner.generate([Request((5, 9, 23), SamplingParams(max_tokens=30))])[0]
    assert result.token_ids == reference(tmp_path / "base", [5, 9, 23], 30)


def test_prompts_longer_than_a_chunk(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "llama", max_position_embeddings=1024)
    engine = build_engine(checkpoint, tmp_path / "engine", max_input_len=700, max_seq_len=800)
    prompt = [(7 * i) % VOCAB for i in range(600)]
    result = load(engine).generate([Request(tuple(prompt), SamplingParams(max_tokens=10, ignore_eos=True))])[0]
    expected = reference(tmp_path / "base", prompt, 10)
    assert result.token_ids[: len(expected)] == expected


def test_base_only_checkpoint_decodes_autoregressively(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, "qwen2", drafter=False)
    result = runner.generate([Request((5, 9, 23), SamplingParams(max_tokens=20))])[0]
    assert result.token_ids == reference(tmp_path / "base", [5, 9, 23], 20)
    assert runner.info.draft_shape is None
    assert result.acceptance_length == 1.0
