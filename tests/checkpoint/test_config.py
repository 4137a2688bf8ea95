"""config.json in and out, from every writer we know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trtllm_redrafter.checkpoint.config import CheckpointConfig, config_dict
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import read_json

PEER = Path(__file__).parents[1] / "data" / "peer" / "expected"

LLAMA: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}
REDRAFTER = LLAMA | {
    "architecture": "ReDrafterForLLaMALM",
    "base_model_architecture": "LlamaForCausalLM",
    "redrafter_num_layers": 2,
    "redrafter_hidden_size": 64,
    "redrafter_exit_dim": 128,
    "redrafter_is_rnn": True,
    "redrafter_num_beams": 4,
    "redrafter_draft_len_per_beam": 3,
    "redrafter_greedy_search": False,
}


def parse(values: dict[str, Any], **kwargs: Any) -> CheckpointConfig:
    return CheckpointConfig.from_dict(values, where="config.json", **kwargs)


def test_defaults_are_tensorrt_llms() -> None:
    config = parse(LLAMA)
    assert (config.num_key_value_heads, config.head_size, config.intermediate_size) == (4, 16, 256)
    assert (config.norm_epsilon, config.rotary_base, config.rotary_scaling) == (1e-5, 10000.0, None)
    assert (config.tp_size, config.pp_size, config.use_parallel_embedding) == (1, 1, False)
    assert config.drafter is None and config.draft_shape is None and config.quant_algo is None


@pytest.mark.parametrize("values", [LLAMA, REDRAFTER, LLAMA | {"architecture": "Qwen3ForCausalLM"}])
def test_round_trip_keeps_every_value_and_unknown_keys(values: dict[str, Any]) -> None:
    values = values | {"chunk_length": 17, "runtime_defaults": {"a": 1}, "logits_dtype": "float16"}
    once = config_dict(parse(values))
    assert {key: once[key] for key in values} == values
    assert parse(once) == parse(config_dict(parse(once)))
    assert config_dict(parse(once)) == once


def test_redrafter_fields() -> None:
    config = parse(REDRAFTER)
    assert config.drafter is not None and config.draft_shape is not None
    assert (config.drafter.exit_dim, config.drafter.num_layers, config.drafter.rnn) == (128, 2, True)
    assert config.draft_shape.max_tree_tokens == 13
    assert config.greedy is False
    assert config.base_architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("name", "attn_bias", "qk_norm", "dense_bias"),
    [("Qwen2ForCausalLM", True, False, False), ("Qwen3ForCausalLM", False, True, False)],
)
def test_qwen_is_understood_without_qwen_type(name: str, attn_bias: bool, qk_norm: bool, dense_bias: bool) -> None:
    config = parse(LLAMA | {"architecture": name})
    assert (config.attn_bias, config.has_qk_norm, config.dense_bias) == (attn_bias, qk_norm, dense_bias)
    written = config_dict(config)
    assert written["qwen_type"] == name[:5].lower()
    assert written["seq_length"] == 8192 and written["moe_intermediate_size"] == 0


def test_qwen_type_decides_where_the_class_name_is_shared() -> None:
    config = parse(REDRAFTER | {"architecture": "ReDrafterForQWenLM", "base_model_architecture": "QWenForCausalLM"}
                   | {"qwen_type": "qwen3"})  # fmt: skip
    assert config.base_architecture == "Qwen3ForCausalLM" and config.has_qk_norm


def test_missing_bias_flags_are_settled_by_the_tensors() -> None:
    names = ["transformer.layers.0.attention.qkv.bias", "transformer.layers.0.mlp.fc.bias"]
    assert parse(LLAMA).attn_bias is False
    config = parse(LLAMA, tensor_names=names)
    assert config.attn_bias and config.mlp_bias and config.dense_bias
    assert parse(LLAMA | {"attn_bias": False}, tensor_names=names).attn_bias is False


@pytest.mark.parametrize("name", sorted(p.name for p in PEER.iterdir()))
def test_the_exporters_configs(name: str) -> None:
    raw = read_json(PEER / name / "config.json")
    written = config_dict(parse(raw))
    assert {key: written[key] for key in raw if key != "quantization"} == {
        key: value for key, value in raw.items() if key != "quantization"
    }
    assert written["quantization"] == raw["quantization"]


def test_excludes_are_completed_when_a_drafter_joins_a_quantized_base() -> None:
    drafter, shape = parse(REDRAFTER).drafter, parse(REDRAFTER).draft_shape
    assert drafter is not None and shape is not None

    def excludes(quantization: dict[str, Any]) -> list[str]:
        config = parse(LLAMA | {"quantization": quantization}).with_drafter(drafter, shape, greedy=True)
        listed: list[str] = config_dict(config)["quantization"]["exclude_modules"]
        return listed

    found = excludes({"quant_algo": "FP8", "exclude_modules": ["lm_head"]})
    assert found[0] == "lm_head" and {"drafter*", "*lm_head", "*vocab_embedding"} <= set(found)
    assert "drafter*" in excludes({"quant_algo": "FP8"})


def test_all_problems_in_one_message() -> None:
    broken = LLAMA | {"dtype": "int8", "hidden_size": "64", "vocab_size": 0, "attn_bias": "no", "rotary_scaling": 3}
    broken |= {"mapping": {"tp_size": 0}, "rotary_base": float("nan")}
    del broken["num_hidden_layers"]
    with pytest.raises(InputError) as e:
        parse(broken)
    for part in ("dtype is 'int8'", "hidden_size is '64'", "vocab_size is 0", "attn_bias is 'no'",
                 "rotary_scaling is 3", "mapping.tp_size is 0", "rotary_base is nan",
                 "num_hidden_layers is missing"):  # fmt: skip
        assert part in str(e.value)


@pytest.mark.parametrize("name", ["ReDrafterForCausalLM", "GPTForCausalLM"])
def test_unknown_architectures(name: str) -> None:
    with pytest.raises(InputError, match=f"architecture {name!r} is not supported"):
        parse(LLAMA | {"architecture": name})


def test_drafter_of_another_width() -> None:
    with pytest.raises(InputError, match="redrafter_hidden_size is 32, hidden_size is 64"):
        parse(REDRAFTER | {"redrafter_hidden_size": 32})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_algo", 3), ("kv_cache_quant_algo", ["FP8"]), ("group_size", "128"), ("group_size", -1),
        ("exclude_modules", "lm_head"), ("exclude_modules", [1]),
    ],
)  # fmt: skip
def test_a_quantization_section_of_other_types_is_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"quantization\.{key} is "):
        parse(LLAMA | {"quantization": {key: value}})
