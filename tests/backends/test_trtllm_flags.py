"""Flags against the documented interface of trtllm-build, and the values its builder changes."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.standins import build_program
from tests.trtllm_options import model_config, options, settings
from trtllm_redrafter.backends.tensorrt_llm.attention import PRECOMPILED, RUNTIME, context_attention, tree_kernel
from trtllm_redrafter.backends.tensorrt_llm.build_plan import plan_for
from trtllm_redrafter.backends.tensorrt_llm.engine_dir import expectation_problems
from trtllm_redrafter.backends.tensorrt_llm.flag_plan import plan_flags
from trtllm_redrafter.backends.tensorrt_llm.flag_table import CHOICE, FLAGS, INT, OWNED, SWITCH
from trtllm_redrafter.backends.tensorrt_llm.versions import RELEASES, Status, parse_version, release_for, satisfies
from trtllm_redrafter.errors import MismatchError
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape

CONTRACT: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "trtllm" / "trtllm_build_flags.json").read_text()
)
FP8 = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["drafter*", "*lm_head"]}


@pytest.mark.parametrize("name", FLAGS)
def test_flag_table_is_the_documented_interface(name: str) -> None:
    documented, ours = CONTRACT[f"--{name}"], FLAGS[name]
    if ours.kind == CHOICE:
        assert set(ours.choices) == set(documented["choices"])
    elif ours.kind == SWITCH:
        assert documented["type"].startswith("switch")
    else:
        assert documented["type"] == ("int" if ours.kind == INT else "str") and documented["choices"] is None


def legal(arguments: list[str]) -> dict[str, str]:
    """Parse a command line by the contract alone; fails on anything it does not document."""
    found, at = {}, 0
    while at < len(arguments):
        documented = CONTRACT[arguments[at]]
        if documented["type"].startswith("switch"):
            found[arguments[at]] = ""
            at += 1
            continue
        value = arguments[at + 1]
        assert documented["choices"] is None or value in documented["choices"], (arguments[at], value)
        assert documented["type"] != "int" or str(int(value)) == value
        found[arguments[at]] = value
        at += 2
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"tp_size": 4},
        {"quantization": FP8},
        {"quantization": FP8 | {"kv_cache_quant_algo": None}},
        {"quantization": {"quant_algo": "W4A16_AWQ", "exclude_modules": ["drafter*"]}},
        {"quantization": {"kv_cache_quant_algo": "FP8"}},
        {"drafter": None, "draft_shape": None, "architecture": "LlamaForCausalLM"},
    ],
)
def test_every_command_line_is_legal(changes: dict[str, Any]) -> None:
    config = model_config(**changes)
    plan = plan_flags(config, options(), settings())
    found = legal(
        plan.arguments(checkpoint=Path("c"), output=Path("o"), timing_cache_in=Path("t"), timing_cache_out=Path("u"))
    )
    assert found["--checkpoint_dir"] == "c" and found["--output_dir"] == "o" and found["--max_beam_width"] == "1"
    assert found["--kv_cache_type"] == "paged" and found["--remove_input_padding"] == "enable"
    assert ("--speculative_decoding_mode" in found) == (config.drafter is not None)
    assert ("--nccl_plugin" in found) == (config.tp_size > 1)
    assert found["--gpt_attention_plugin"] == config.dtype
    assert all(flag.reason and flag.origin for flag in plan.flags)


def test_quantized_models_get_what_the_builder_would_choose() -> None:
    def value(name: str, **quantization: Any) -> object:
        return plan_flags(model_config(quantization=quantization), options(), settings()).value(name)

    assert value("gemm_plugin") == "bfloat16" and value("gemm_plugin", quant_algo="FP8") == "fp8"
    both = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    assert value("use_fp8_context_fmha", **both) == "enable" and value("use_fp8_context_fmha") == "disable"
    assert value("use_paged_context_fmha", kv_cache_quant_algo="FP8") == "disable"
    awq = {"quant_algo": "W4A8_AWQ", "kv_cache_quant_algo": "FP8"}
    assert value("use_fp8_context_fmha", **awq) == value("use_paged_context_fmha", **awq) == "enable"
    assert value("use_fused_mlp", quant_algo="W4A16_AWQ") == "disable" and value("use_fused_mlp", **both) == "enable"


def test_what_the_builder_changes() -> None:
    plan = plan_flags(model_config(tp_size=2), options(), settings())
    assert {c.name: (c.given, c.becomes) for c in plan.changes} == {
        "max_draft_len": ("0", "12"),
        "max_seq_len": ("2048", "2060"),
        "nccl_plugin": ("auto", "bfloat16"),
    }
    assert plan.value("max_num_tokens") == 1024 + 7 * 13 and plan.value("opt_num_tokens") == 8 * 13
    assert plan.expected["max_seq_len"] == 2060 and plan.expected["speculative_decoding_mode"] == 16
    low = plan_flags(model_config(), options(max_input_len=20), settings(max_num_tokens=50))
    raised = {c.name: (c.given, c.becomes) for c in low.changes}
    assert raised["max_num_tokens"] == ("50", str(8 * 13)) and low.limits.max_num_tokens == 104
    high = plan_flags(model_config(), options(max_batch_size=1), settings(max_num_tokens=8192))
    assert high.limits.max_num_tokens == 2048 == high.expected["max_num_tokens"], "capped before the tree is added"
    asked = plan_flags(model_config(), options(), settings(flags={"reduce_fusion": "enable", "user_buffer": "enable"}))
    assert {"reduce_fusion", "user_buffer"} <= {c.name for c in asked.changes if c.becomes == "disable"}
    plain = model_config(drafter=False, tp_size=2)
    kept = plan_flags(plain, options(), settings(flags={"reduce_fusion": "enable", "user_buffer": "enable"}))
    assert kept.expected["plugin_config"]["reduce_fusion"] and "user_buffer" not in {c.name for c in kept.changes}
    forced = {"use_paged_context_fmha": "enable", "use_fused_mlp": "enable"}
    cached = model_config(quantization={"kv_cache_quant_algo": "FP8"})
    off = {c.name: c.why for c in plan_flags(cached, options(), settings(flags=forced)).changes if c.given == "enable"}
    assert set(off) == {"use_paged_context_fmha"}
    assert off["use_paged_context_fmha"] == "FP8 KV cache, bfloat16 weights"
    eight = model_config(quantization={"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"})
    unwanted = plan_flags(eight, options(), settings(flags={"use_fp8_context_fmha": "disable"})).changes
    assert [(c.given, c.becomes) for c in unwanted if c.name == "use_fp8_context_fmha"] == [("disable", "enable")]
    awq = model_config(quantization={"quant_algo": "W4A16_AWQ"})
    useless = {c.name: c.becomes for c in plan_flags(awq, options(), settings(flags=forced)).changes}
    assert useless["use_fused_mlp"] == "no effect"
    assert plan.changes and not plan_flags(model_config(drafter=False), options(), settings()).changes


@given(
    batch=st.integers(1, 64), longest=st.integers(2, 4096), share=st.floats(0.01, 0.99),
    beams=st.integers(1, 50), length=st.integers(1, 8), opt=st.none() | st.integers(1, 64),
)  # fmt: skip
def test_derived_limits_need_no_correction(
    batch: int, longest: int, share: float, beams: int, length: int, opt: int | None
) -> None:
    """What is derived is what the builder keeps: prompts fit a step, every request's tree fits a step."""
    shape = DraftShape(beams, length)
    prompt = max(1, int(longest * share))
    wanted = options(max_batch_size=batch, max_input_len=prompt, max_seq_len=longest)
    plan = plan_flags(model_config(draft_shape=shape), wanted, settings(opt_batch_size=opt))
    tokens, tuned = plan.value("max_num_tokens"), plan.value("opt_num_tokens")
    assert isinstance(tokens, int) and isinstance(tuned, int)
    assert tokens == plan.limits.max_num_tokens and "max_num_tokens" not in {c.name for c in plan.changes}
    assert prompt <= tokens and batch * shape.max_tree_tokens <= tokens and 1 <= tuned <= tokens


@given(
    batch=st.integers(1, 64), longest=st.integers(2, 512), asked=st.integers(1, 40000),
    block=st.sampled_from((32, 128)), opt=st.none() | st.integers(1, 64),
    shape=st.none() | st.builds(DraftShape, st.integers(1, 50), st.integers(1, 8)), ranks=st.sampled_from((1, 2)),
    fusion=st.sets(st.sampled_from(("reduce_fusion", "user_buffer", "norm_quant_fusion"))),
)  # fmt: skip
def test_values_end_as_the_builder_ends_them(
    batch: int,
    longest: int,
    asked: int,
    block: int,
    shape: DraftShape | None,
    opt: int | None,
    ranks: int,
    fusion: set[str],
) -> None:
    """Capped by the sequence length without the tree, then raised to the tree: as the stand-in, step by step."""
    config = model_config(draft_shape=shape, drafter=shape is not None, tp_size=ranks)
    wanted = options(max_batch_size=batch, max_input_len=1, max_seq_len=longest)
    chosen = settings(
        max_num_tokens=asked, opt_batch_size=opt, flags={"tokens_per_block": block} | dict.fromkeys(fusion, "enable")
    )
    plan = plan_flags(config, wanted, chosen)
    passed = plan.arguments(checkpoint=Path("c"), output=Path("o"), timing_cache_in=None, timing_cache_out=Path("t"))
    written: dict[str, Any] = {"architecture": config.architecture, "mapping": {"tp_size": ranks}}
    if shape is not None:
        written |= {"redrafter_num_beams": shape.num_beams, "redrafter_draft_len_per_beam": shape.draft_len}
    built = build_program.build_config(build_program.parser(CONTRACT).parse_args(passed), written)
    assert not expectation_problems({"build_config": built}, plan.expected, Path("e"))
    assert plan.limits.max_num_tokens == built["max_num_tokens"]


def refusal(config_changes: dict[str, Any] | None = None, **changes: Any) -> str:
    ours = {k: changes.pop(k) for k in ("max_batch_size", "max_input_len", "max_seq_len") if k in changes}
    with pytest.raises(MismatchError) as caught:
        plan_for(model_config(**(config_changes or {})), options(settings(**changes), **ours))
    return caught.value.render()


@pytest.mark.parametrize(
    ("config", "changes", "says", "remedy"),
    [
        ({"dtype": "float32"}, {}, "the checkpoint is float32", "--dtype bfloat16"),
        ({"pp_size": 2}, {}, "pipeline parallelism", "tensor parallelism only"),
        ({"tp_size": 3}, {}, "cannot be divided by 3 ranks", "tensor-parallel size"),
        ({"draft_shape": DraftShape(51, 4)}, {}, "num_beams is 51", "50 or fewer"),
        ({"greedy": False}, {}, "asks for a sampling engine", "allow_sampling"),
        ({"num_attention_heads": 64, "num_key_value_heads": 1}, {}, "groups of at most 32", "ranks"),
        ({"head_size": 72}, {}, "these are 72", "without a drafter"),
        ({}, {"flags": {"tokens_per_block": 8}}, "KV blocks of 16, 32, 64, 128", "32 tokens"),
        (
            {"quantization": FP8},
            {"flags": {"gemm_swiglu_plugin": "fp8", "use_fused_mlp": "disable"}},
            "without use_fused_mlp",
            "leave use_fused_mlp out",
        ),
        ({}, {"max_seq_len": 5000}, "exceeds the model's 4096 positions", "4096 or less"),
        ({}, {"max_input_len": 2048}, "leaves no room", "--max-input-len"),
        ({}, {"max_batch_size": 0}, "max_batch_size is 0", "positive"),
        ({}, {"max_num_tokens": 100}, "less than a prompt of 1024", "raise it"),
        ({}, {"version": "0.13.0"}, "not supported", "1.2.1"),
        ({}, {"version": "1.3.0rc22"}, "removed", "1.2.1"),
        ({}, {"version": "latest"}, "not a version", "1.2.1"),
        ({"quantization": {"quant_algo": "FP8"}}, {"gpu": "a100-80gb"}, "FP8 weights cannot run", "Hopper"),
        ({"quantization": {"quant_algo": "FP8", "exclude_modules": ["*lm_head"]}}, {}, "not excluded", "drafter*"),
        ({}, {"flags": {"max_beam_width": 4}}, "max_beam_width is 4", "num_beams"),
        ({}, {"flags": {"gather_context_logits": True}}, "gather_context_logits", "leave it out"),
        ({}, {"flags": {"gather_all_token_logits": True}}, "context logits", "leave it out"),
        ({}, {"flags": {"multiple_profiles": "enable"}}, "multiple_profiles", "leave it out"),
        ({}, {"flags": {"streamingllm": "enable"}}, "streamingllm", "leave it out"),
        ({}, {"flags": {"remove_input_padding": "disable"}}, "remove_input_padding", "leave it out"),
        ({}, {"flags": {"kv_cache_type": "continuous"}}, "kv_cache_type", "leave it out"),
        ({}, {"flags": {"speculative_decoding_mode": "medusa"}}, "medusa", "leave it out"),
        ({}, {"flags": {"gpt_attention_plugin": "disable"}}, "gpt_attention_plugin", "leave it out"),
        ({}, {"flags": {"strip_plan": True}}, "strip_plan", "leave it out"),
        ({}, {"gemm_plugin": "fp8"}, "the weights are bfloat16", "FP8 base"),
        ({}, {"gemm_plugin": "float16"}, "gemm_plugin is float16", "leave it out"),
        ({"quantization": FP8 | {"quant_algo": "NVFP4"}}, {}, "NVFP4 cannot run on H100", "FP8 instead"),
        (
            {"quantization": FP8 | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}},
            {"gpu": "a100-80gb"},
            "FP8_PER_CHANNEL_PER_TOKEN weights cannot run",
            "Hopper",
        ),
        ({}, {"flags": {"gemm_swiglu_plugin": "fp8"}}, "gemm_swiglu_plugin", "leave it out"),
        ({}, {"flags": {"max_draft_len": 9}}, "follows from another setting", "convert.num_beams"),
        ({}, {"flags": {"reduce_fusions": "enable"}}, "no flag 'reduce_fusions'", "'reduce_fusion'"),
        ({}, {"flags": {"context_fmha": True}}, "context_fmha is True", "enable, disable"),
    ],
)
def test_refusals(config: dict[str, Any], changes: dict[str, Any], says: str, remedy: str) -> None:
    text = refusal(config, **changes)
    assert says in text and remedy in text and "remedy" in text


def test_all_refusals_come_together() -> None:
    text = refusal({"dtype": "float32", "greedy": False}, flags={"max_beam_width": 2}, version="1.3.0")
    assert text.count("\n- ") == 4


@pytest.mark.parametrize(
    ("group", "head_size", "block", "fp8_cache", "capability", "kind", "fits"),
    [
        (1, 64, 32, False, (9, 0), RUNTIME, True),
        (4, 128, 64, False, (8, 0), RUNTIME, True),
        (4, 96, 16, False, (8, 9), RUNTIME, True),  # a multiple of 16 is enough
        (4, 256, 128, True, (8, 0), RUNTIME, True),
        (4, 104, 32, False, (9, 0), RUNTIME, False),
        (4, 16, 32, False, (9, 0), RUNTIME, False),  # the kernel would do, the attention layer does not
        (4, 64, 8, False, (9, 0), RUNTIME, False),
        (4, 64, 8, True, (9, 0), RUNTIME, True),  # Hopper's kernels for FP8 caches read blocks of 8 too
        (4, 64, 8, True, (8, 9), RUNTIME, False),
        (32, 64, 32, False, (9, 0), RUNTIME, True),
        (64, 64, 32, False, (9, 0), RUNTIME, False),  # divides 64, so no precompiled kernel is asked
        (64, 64, 32, True, (9, 0), RUNTIME, False),
        (48, 64, 32, True, (9, 0), RUNTIME, False),
        (7, 80, 32, True, (9, 0), RUNTIME, True),
        (7, 128, 32, False, (9, 0), PRECOMPILED, True),
        (5, 128, 32, True, (8, 9), PRECOMPILED, True),
        (5, 128, 32, True, (8, 0), PRECOMPILED, False),
        (5, 80, 32, False, (9, 0), PRECOMPILED, False),
        (5, 256, 32, False, (9, 0), PRECOMPILED, False),
        (5, 128, 16, False, (9, 0), PRECOMPILED, False),
        (71, 128, 32, True, (9, 0), PRECOMPILED, True),
    ],
)
def test_kernels_that_verify_trees(
    group: int, head_size: int, block: int, fp8_cache: bool, capability: tuple[int, int], kind: str, fits: bool
) -> None:
    found, reasons = tree_kernel(
        group=group, head_size=head_size, tokens_per_block=block, fp8_cache=fp8_cache, capability=capability
    )
    assert found == kind and (not reasons) == fits, reasons


@pytest.mark.parametrize(
    ("algo", "cache", "asked", "becomes"),
    [
        (None, None, (True, True), (True, False)),
        (None, "FP8", (True, True), (False, False)),
        ("W4A16_AWQ", "FP8", (True, True), (False, False)),
        (None, "INT8", (True, True), (False, False)),
        ("FP8", "FP8", (True, False), (True, True)),
        ("FP8", "FP8", (False, False), (False, False)),
        ("FP8", None, (True, True), (True, False)),
        ("FP8", None, (False, True), (False, True)),
        ("W4A8_AWQ", "FP8", (True, True), (True, True)),
        ("W4A8_AWQ", "INT8", (True, True), (False, False)),
        ("NVFP4", "FP8", (True, True), (True, True)),
    ],
)
def test_how_prompts_are_attended_to(
    algo: str | None, cache: str | None, asked: tuple[bool, bool], becomes: tuple[bool, bool]
) -> None:
    paged, fp8 = asked
    assert context_attention(algo, cache, paged=paged, fp8=fp8) == becomes
    ours = Namespace(context_fmha="enable", **{
        name: "enable" if on else "disable"
        for name, on in (("use_paged_context_fmha", paged), ("use_fp8_context_fmha", fp8))
    })  # fmt: skip
    quantization = {"quant_algo": algo, "kv_cache_quant_algo": cache}
    assert build_program.context_attention(ours, quantization) == becomes, "as the stand-in, branch by branch"


def test_groups_of_heads_are_those_of_a_rank() -> None:
    sizes = {"num_attention_heads": 128, "num_key_value_heads": 2, "intermediate_size": 2880, "hidden_size": 1536}
    drafter = DrafterConfig(vocab_size=32000, hidden_size=1536, exit_dim=3072, num_layers=2)
    many = replace(model_config(**sizes), drafter=drafter)
    with pytest.raises(MismatchError, match="groups of 64"):
        plan_for(many, options())
    assert plan_for(replace(many, tp_size=4), options()).flags  # KV heads are repeated: each has 32 heads on its rank
    logits = settings(flags={"gather_context_logits": True})  # and so do context logits
    assert plan_for(model_config(drafter=False, **sizes), options(logits)).flags


def test_warnings_do_not_refuse() -> None:
    def warnings(config: dict[str, Any], **changes: Any) -> str:
        ours = {k: changes.pop(k) for k in ("max_batch_size",) if k in changes}
        plan = plan_for(model_config(**config), options(settings(**changes), **ours))
        return "\n".join(p.render() for p in plan.warnings)

    assert warnings({}) == ""
    assert "the engine will sample" in warnings({"greedy": False}, allow_sampling=True)
    assert "no effect" in warnings({}, flags={"reduce_fusion": "enable"})
    assert "max_batch_size is 128" in warnings({}, max_batch_size=128)
    assert "shared between prompts" in warnings({}, runtime=replace(settings().runtime, block_reuse=True))
    assert "not the release" in warnings({}, version="1.1.0")
    assert "split over the ranks" in warnings({"use_parallel_embedding": True, "tp_size": 2})
    assert "heads have 96" in warnings({"head_size": 96})
    seven = {"num_attention_heads": 14, "num_key_value_heads": 2}
    assert "7 query heads share a KV head" in warnings(seven) and "groups of 5" in warnings(seven)
    assert "MistralForCausalLM" in warnings({"architecture": "MistralForCausalLM"})
    assert "FP8" in warnings({"architecture": "Qwen2ForCausalLM", "quantization": FP8})


def test_releases_cover_all_versions_in_order() -> None:
    assert [r.until for r in RELEASES[:-1]] == [r.first for r in RELEASES[1:]]
    assert all(r.notes for r in RELEASES if r.status is not Status.TARGET)
    for version, status in (
        ("0.11.0", Status.REFUSED), ("0.19.0", Status.REFUSED), ("1.0.0", Status.ACCEPTED), ("1.1.0", Status.ACCEPTED),
        ("1.2.0rc2", Status.TARGET), ("1.2.1", Status.TARGET), ("1.3.0rc1", Status.REFUSED), ("2.0", Status.REFUSED),
    ):  # fmt: skip
        release = release_for(version)
        assert release is not None and release.status is status, version
    assert release_for("main") is None and parse_version("1.2.0rc2") == (1, 2, 0)
    assert satisfies("2.9.1+cu130", ">=2.9.1,<=2.10.0a0") and not satisfies("2.8.0", ">=2.9.1,<=2.10.0a0")


def test_owned_flags_are_known() -> None:
    assert set(OWNED) <= set(FLAGS)
