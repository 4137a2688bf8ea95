"""config.json of transformers 4 and 5, family by family, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import FAMILIES, LINEAR_ROPE, LLAMA3_ROPE, base_config
from trtllm_redrafter.base_models.hf_config import ParsedConfig, parse_hf_config
from trtllm_redrafter.checkpoint.config import CheckpointConfig


def parse(family: str = "llama", remove: tuple[str, ...] = (), **changes: Any) -> ParsedConfig:
    raw = base_config(family, **changes)
    return parse_hf_config({k: v for k, v in raw.items() if k not in remove}, where=Path("config.json"))


def good(family: str = "llama", remove: tuple[str, ...] = (), **changes: Any) -> CheckpointConfig:
    parsed = parse(family, remove, **changes)
    assert parsed.problems == () and parsed.config is not None
    return parsed.config


def modern(family: str, rope: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5 writes it."""
    raw = base_config(family)
    del raw["rope_theta"]
    raw["dtype"] = raw.pop("torch_dtype")
    return raw | {"rope_parameters": rope}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"rope_theta": 10000.0, "rope_type": "default"}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, {"rope_theta": 5e5, **LLAMA3_ROPE}),
        ({"rope_scaling": LINEAR_ROPE}, {"rope_theta": 10000.0, **LINEAR_ROPE}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_both_generations_of_transformers_mean_the_same(family: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    parsed = parse_hf_config(modern(family, new), where=Path("config.json"))
    assert parsed.config == good(family, **old)


@pytest.mark.parametrize(
    ("mixed", "old"),
    [
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}}, {"rope_theta": 1e6}),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LLAMA3_ROPE},
         {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}),
        ({"rope_theta": 5e5, "rope_parameters": LLAMA3_ROPE}, {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}),
        ({"rope_scaling": {"rope_theta": 5e5, **LINEAR_ROPE}}, {"rope_theta": 5e5, "rope_scaling": LINEAR_ROPE}),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0, **LINEAR_ROPE}},
         {"rope_theta": 5e5, "rope_scaling": LINEAR_ROPE}),
        ({"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "original_max_position_embeddings"},
          "original_max_position_embeddings": 64}, {"rope_scaling": LLAMA3_ROPE}),
        ({"rope_theta": 1e6, "rope_scaling": LINEAR_ROPE, "rope_parameters": {"rope_theta": 1000000, **LINEAR_ROPE}},
         {"rope_theta": 1e6, "rope_scaling": LINEAR_ROPE}),
    ],
)  # fmt: skip
def test_files_migrated_halfway(mixed: dict[str, Any], old: dict[str, Any]) -> None:
    """What one place leaves out is taken from the other."""
    remove = () if "rope_theta" in mixed else ("rope_theta",)
    expected = {"rope_theta": 10000.0} | old
    assert good("llama", remove=remove, **mixed) == good("llama", **expected)


def test_one_dtype_in_two_places() -> None:
    assert good(torch_dtype="torch.bfloat16", dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("named", [None, []])
def test_without_architectures_the_model_type_counts(named: Any) -> None:
    for family in FAMILIES:
        assert good(family, architectures=named) == good(family)


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("first", [0, 1, 2, 28])
def test_windows_are_those_of_transformers(use: bool, first: int) -> None:
    """Its own `layer_types`, made from the older switches, say the same as ours."""
    from transformers import Qwen2Config

    switches = {"sliding_window": 64, "use_sliding_window": use, "max_window_layers": first}
    types = Qwen2Config(num_hidden_layers=2, **switches).layer_types
    positions = good("qwen2", **switches).max_position_embeddings
    assert (positions == 64) == ("sliding_attention" in types)
    assert good("qwen2", layer_types=types, **switches).max_position_embeddings == positions


def test_scalings_are_kept_as_they_are() -> None:
    assert good(rope_scaling=LLAMA3_ROPE).rotary_scaling == LLAMA3_ROPE
    legacy = {"type": "linear", "factor": 4.0}
    assert good(rope_scaling=legacy).rotary_scaling == legacy
    assert good(rope_scaling={"rope_type": "default"}).rotary_scaling is None


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, (False, False, False, None)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, (True, True, False, None)),
        ("mistral", {}, (False, False, False, None)),
        ("qwen2", {}, (True, False, False, "qwen2")),
        ("qwen3", {}, (False, False, True, "qwen3")),
    ],
)
def test_families(family: str, changes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    config = good(family, **changes)
    assert (config.attn_bias, config.mlp_bias, config.has_qk_norm, config.qwen_type) == expected


def test_head_size() -> None:
    assert good("llama").head_size == 8
    assert good("mistral", head_dim=24).head_size == 24
    assert good("qwen3", remove=("head_dim",)).head_size == 128  # transformers' default for Qwen3
    assert "not a multiple" in parse("llama", hidden_size=34).problems[0].what


def test_defaults_of_transformers() -> None:
    config = good("llama", remove=("rms_norm_eps", "rope_theta", "num_key_value_heads", "tie_word_embeddings"))
    assert (config.norm_epsilon, config.rotary_base) == (1e-6, 10000.0)
    assert (config.num_key_value_heads, config.tie_word_embeddings) == (4, False)


@pytest.mark.parametrize(
    ("family", "changes", "remove", "positions"),
    [
        ("mistral", {"sliding_window": 64}, (), 64),
        ("mistral", {"sliding_window": None}, (), 256),
        ("mistral", {"sliding_window": 4096}, (), 256),
        ("mistral", {"max_position_embeddings": 32768}, ("sliding_window",), 4096),  # transformers' default
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, (), 256),
        ("qwen2", {"sliding_window": 64}, (), 256),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, (), 64),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, (), 256),  # only layers from 28 up
        (
            "qwen3",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention"] * 2,
            },
            (),
            64,
        ),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": False, "layer_types": ["full_attention"] * 2}, (), 256),
        ("llama", {"max_position_embeddings": 131072}, (), 131072),
    ],
)
def test_sliding_windows_limit_the_length(
    family: str, changes: dict[str, Any], remove: tuple[str, ...], positions: int
) -> None:
    parsed = parse(family, remove, **changes)
    assert parsed.config is not None and parsed.config.max_position_embeddings == positions
    cut = changes.get("max_position_embeddings", 256) != positions
    assert bool(parsed.notes) == cut
    if cut:
        assert f"to the sliding window, {positions}" in parsed.notes[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["OPTForCausalLM"]}, "'OPTForCausalLM' is not supported"),
    "no architecture": ({"architectures": None, "model_type": "opt"}, "model_type 'opt' is not supported"),
    "neither": ({"architectures": [], "model_type": None}, "model_type None is not supported"),
    "architecture and model_type": ({"model_type": "qwen2"}, "LlamaForCausalLM, model_type is 'qwen2'"),
    "two architectures": ({"architectures": ["A", "B"]}, "is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn' is not supported"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rotary scaling 'dynamic'"),
    "unknown rope": ({"rope_scaling": {"rope_type": "spiral"}}, "rotary scaling 'spiral'"),
    "rope per layer type": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rotary scaling"),
    "llama3 without its fields": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor is missing",
    ),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "dtype": ({"torch_dtype": "float64"}, "the dtype 'float64' is not supported"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantized in Hugging Face's format (awq)"),
    "quantized, as a text": ({"quantization_config": "awq"}, "quantization_config is 'awq'"),
    "rope as a text": ({"rope_parameters": "linear"}, "rope_parameters is 'linear'"),
    "two dtypes": ({"dtype": "bfloat16"}, "dtype is 'bfloat16' (dtype) and 'float32' (torch_dtype)"),
    "two bases": (
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
        "rope_theta is 1000000.0 (top-level) and 10000.0 (rope_parameters)",
    ),
    "two scalings": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3_ROPE},
        "the rotary scaling is 'default' (rope_parameters.rope_type) and 'llama3' (rope_scaling.rope_type)",
    ),
    "two factors": (
        {"rope_parameters": LINEAR_ROPE, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "factor is 2.0 (rope_parameters) and 4.0 (rope_scaling)",
    ),
    "two names of a scaling": (
        {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
        "the rotary scaling is 'llama3' (rope_scaling.rope_type) and 'linear' (rope_scaling.type)",
    ),
    "two original lengths": (
        {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 32},
        "original_max_position_embeddings is 32 (top-level) and 64 (rotary scaling)",
    ),
    "partial rotation in both forms": (
        {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 1.0 (top-level) and 0.5 (rope_parameters)",
    ),
    "windows where none is": ({"layer_types": ["sliding_attention"] * 2}, "layer_types lists some sliding_attention"),
    "layers of the wrong number": ({"layer_types": ["full_attention"]}, "layer_types is not usable"),
    "a drafter": ({"exit_dim": 64}, "this is a drafter, not a base model"),
    "missing size": ({"vocab_size": None}, "vocab_size is missing"),
    "wrong size": ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    changes, message = REFUSED[case]
    parsed = parse("llama", **changes)
    assert parsed.config is None
    assert any(message in p.what for p in parsed.problems), parsed.problems
    assert all("config.json" in str(p.where) for p in parsed.problems)


def test_all_problems_together() -> None:
    parsed = parse("llama", hidden_act="relu", vocab_size=0, rope_scaling={"rope_type": "su"})
    assert len(parsed.problems) == 3
