"""Memory plans: products checked by hand, against the tensors a conversion really lays out."""

from __future__ import annotations

import math

import pytest

from tests.trtllm_options import model_config
from trtllm_redrafter.checkpoint.layout import tensor_specs
from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.planning.gpus import GPUS, gpu, gpu_by_driver_name
from trtllm_redrafter.planning.memory import (
    BuildLimits,
    base_parameters,
    drafter_parameters,
    estimate_memory,
    kv_bytes_per_token,
    weight_bytes,
)
from trtllm_redrafter.redrafter.config import DraftShape

LIMITS = BuildLimits(8, 1024, 2048, 1115)


def line(plan_lines: object, name: str) -> int:
    return next(entry.nbytes for entry in plan_lines if entry.name == name)  # type: ignore[attr-defined]


def test_weights_are_the_tensors_of_the_checkpoint() -> None:
    config = model_config()
    whole = sum(2 * math.prod(spec.shape) for spec in tensor_specs(config).values())
    assert weight_bytes(config).total == whole
    layer = 1024 * (1024 + 2 * 256) + 1024 * 1024 + 3 * 1024 * 2816
    assert base_parameters(config) == 4 * layer + 32000 * 1024
    assert drafter_parameters(config) == 2 * 2048 * 2048 + 32000 * 2048 + 2 * 1024 * 1024
    assert weight_bytes(config).draft_head == 2 * 32000 * 2048


def test_ranks_share_weights_and_cache() -> None:
    one, four = weight_bytes(model_config()), weight_bytes(model_config(tp_size=4))
    norms = 2 * 1024 * (2 * 4 + 1)
    assert four.base == (one.base - norms) // 4 + norms and four.embedding == one.embedding
    assert weight_bytes(model_config(tp_size=4, use_parallel_embedding=True)).embedding == one.embedding // 4
    assert kv_bytes_per_token(model_config()) == 2 * 4 * 4 * 64 * 2
    assert kv_bytes_per_token(model_config(tp_size=4)) == 2 * 4 * 1 * 64 * 2
    assert kv_bytes_per_token(model_config(tp_size=8)) == 2 * 4 * 1 * 64 * 2  # heads are repeated
    assert kv_bytes_per_token(model_config(quantization={"kv_cache_quant_algo": "FP8"})) == 2 * 4 * 4 * 64


def test_tied_embeddings_are_stored_once_on_one_rank() -> None:
    assert weight_bytes(model_config(tie_word_embeddings=True)).embedding == 0
    assert weight_bytes(model_config(tie_word_embeddings=True, tp_size=2)).embedding > 0


def test_fp8_weights_are_half_and_the_drafter_is_not() -> None:
    quantization = {"quant_algo": "FP8", "exclude_modules": ["*lm_head", "drafter*"]}
    half, full = weight_bytes(model_config(quantization=quantization)), weight_bytes(model_config())
    assert half.drafter == full.drafter and half.base < 0.75 * full.base
    head = 2 * 32000 * 1024
    assert half.base - head == pytest.approx((full.base - head) / 2, rel=0.01)


def test_drafting_buffers_by_hand() -> None:
    """The case that ruins the builder's default: 2048 requests, 5 x 5, 128256 tokens are 13 GB each way."""
    config = model_config(vocab_size=128256, draft_shape=DraftShape(5, 5))
    plan = estimate_memory(config, BuildLimits(2048, 1024, 2048, 53248), gpu("l40s"), kv_cache_fraction=0.9)
    assert line(plan.lines, "draft probabilities") == 2 * 2048 * 5 * 5 * 128256 * 2
    assert line(plan.lines, "draft probabilities") / 2 == pytest.approx(13.1e9, rel=0.01)
    assert line(plan.lines, "verification") == 2048 * (26 + 5 * 6) * 128256 * 2
    assert "does not fit" in plan.problems()[0].what and "verification" in (plan.problems()[0].remedy or "")


def test_what_is_left_is_the_cache() -> None:
    plan = estimate_memory(model_config(), LIMITS, gpu("h100-80gb"), kv_cache_fraction=0.5)
    assert plan.kv_bytes == int(0.5 * (80 * 10**9 - plan.used_bytes))
    assert plan.kv_tokens == plan.kv_bytes // 4096
    assert plan.longest_request == 2048 + 12 and plan.full_requests == plan.kv_tokens // 2060
    assert not plan.problems() and not plan.warnings()
    held = ("base weights", "embedding", "drafter weights", "activations")
    assert plan.build_gpu_bytes == sum(line(plan.lines, name) for name in held) == plan.as_dict()["build_gpu_bytes"]
    assert "build GPU" in plan.render() and "build host" in plan.render()
    assert plan.as_dict()["kv_tokens"] == plan.kv_tokens and "fits" in plan.render()


def test_tight_plans_warn_and_impossible_ones_refuse() -> None:
    big = model_config(num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
                       num_key_value_heads=64, head_size=128, drafter=False)  # fmt: skip
    assert "does not fit" in estimate_memory(big, LIMITS, gpu("h100-80gb"), kv_cache_fraction=0.9).problems()[0].what
    tight = estimate_memory(
        model_config(), BuildLimits(8, 1024, 4096, 1115), gpu("h100-80gb"), kv_cache_fraction=0.0001
    )
    assert "not one request" in tight.problems()[0].what and not tight.warnings()
    some = estimate_memory(model_config(), BuildLimits(8, 1024, 4096, 1115), gpu("h100-80gb"), kv_cache_fraction=0.001)
    assert not some.problems() and some.full_requests < 8
    assert [w.what.partition(" ")[2] for w in some.warnings()] == [
        "requests of full length fit, max_batch_size is 8",
        "memory is left for the KV cache",
    ]


def test_gpus() -> None:
    assert set(GPUS) == {"h100-80gb", "h100-94gb", "h200", "a100-80gb", "l40s",
                         "l4", "rtx-3090", "rtx-4090", "rtx-5090", "b200"}  # fmt: skip
    for entry in GPUS.values():
        assert entry.bandwidth >= 0.3e12 and entry.bf16_flops < 2.3e15  # dense, not the sheets' figure with sparsity
        assert entry.fp8_flops is None or entry.fp8_flops == pytest.approx(2 * entry.bf16_flops, rel=0.02)
        assert gpu_by_driver_name(entry.driver_names[0]) is entry
    with pytest.raises(UsageError, match="did you mean 'h100-80gb'"):
        gpu("H100-80G")
    assert gpu_by_driver_name("Tesla T4") is None
    assert gpu("a100-80gb").flops(fp8=True) == gpu("a100-80gb").bf16_flops
