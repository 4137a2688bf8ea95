"""Who holds which rows: literal tables, and the property that joining undoes splitting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.checkpoint.test_config import LLAMA, REDRAFTER, parse
from trtllm_redrafter.checkpoint.layout import (
    EMBEDDING,
    LM_HEAD,
    divisibility_problems,
    rank_slice,
    tensor_specs,
)

L0 = "transformer.layers.0."


def with_tp(tp: int, **changes: Any) -> Any:
    mapping = {"mapping": {"world_size": tp, "tp_size": tp, "pp_size": 1}}
    return parse(LLAMA | {"num_key_value_heads": 2, "intermediate_size": 160} | mapping | changes)


# 4 q heads and 2 kv heads of 16 rows: q 0..64, k 64..96, v 96..128
QKV_ROWS = {
    (2, 0): ((0, 32), (64, 80), (96, 112)),
    (2, 1): ((32, 64), (80, 96), (112, 128)),
    (4, 0): ((0, 16), (64, 80), (96, 112)),
    (4, 1): ((16, 32), (64, 80), (96, 112)),
    (4, 2): ((32, 48), (80, 96), (112, 128)),
    (4, 3): ((48, 64), (80, 96), (112, 128)),
}


@pytest.mark.parametrize(("tp", "rank"), QKV_ROWS)
def test_qkv_rows(tp: int, rank: int) -> None:
    config = with_tp(tp)
    spec = tensor_specs(config)[L0 + "attention.qkv.weight"]
    part = rank_slice(spec, config, rank)
    assert part.rows == QKV_ROWS[tp, rank]
    assert part.shape(spec.shape) == ({2: 64, 4: 48}[tp], 64)


# shapes of NVIDIA's exporter for hidden 64, intermediate 160, vocabulary 1001
SHAPES = {
    EMBEDDING: {1: (1001, 64), 2: (501, 64), 4: (251, 64)},
    LM_HEAD: {1: (1001, 64), 2: (501, 64), 4: (251, 64)},
    L0 + "attention.qkv.bias": {1: (128,), 2: (64,), 4: (48,)},
    L0 + "attention.dense.weight": {1: (64, 64), 2: (64, 32), 4: (64, 16)},
    L0 + "attention.dense.bias": {1: (64,), 2: (64,), 4: (64,)},
    L0 + "mlp.fc.weight": {1: (160, 64), 2: (80, 64), 4: (40, 64)},
    L0 + "mlp.fc.bias": {1: (160,), 2: (80,), 4: (40,)},
    L0 + "mlp.proj.weight": {1: (64, 160), 2: (64, 80), 4: (64, 40)},
    L0 + "mlp.proj.bias": {1: (64,), 2: (64,), 4: (64,)},
    L0 + "input_layernorm.weight": {1: (64,), 2: (64,), 4: (64,)},
}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_per_rank(name: str, tp: int) -> None:
    config = with_tp(tp, vocab_size=1001, attn_bias=True, mlp_bias=True, use_parallel_embedding=True)
    spec = tensor_specs(config)[name]
    for rank in range(tp):
        assert rank_slice(spec, config, rank).shape(spec.shape) == SHAPES[name][tp]


def test_padding_may_fill_whole_ranks() -> None:
    config = with_tp(4, vocab_size=5)
    spec = tensor_specs(config)[LM_HEAD]
    parts = [rank_slice(spec, config, rank) for rank in range(4)]
    assert [(p.rows, p.zero_rows) for p in parts] == [
        (((0, 2),), 0), (((2, 4),), 0), (((4, 5),), 1), (((5, 5),), 2),
    ]  # fmt: skip


def test_embedding_whole_by_rows_or_by_columns() -> None:
    for changes, shape in (
        ({}, (96, 64)),
        ({"use_parallel_embedding": True}, (48, 64)),
        ({"use_parallel_embedding": True, "embedding_sharding_dim": 1}, (96, 32)),
    ):
        config = with_tp(2, **changes)
        spec = tensor_specs(config)[EMBEDDING]
        assert rank_slice(spec, config, 1).shape(spec.shape) == shape


def test_drafter_is_divided_by_rows() -> None:
    config = parse(REDRAFTER | {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}})
    specs = tensor_specs(config)
    shapes = {n: rank_slice(s, config, 1).shape(s.shape) for n, s in specs.items() if n.startswith("drafter.")}
    assert shapes == {
        "drafter.layers.0.linear.weight": (64, 128),
        "drafter.layers.0.linear.bias": (64,),
        "drafter.layers.1.linear.weight": (64, 128),
        "drafter.layers.1.linear.bias": (64,),
        "drafter.lm_head.weight": (48, 128),
        "drafter.rnn_u.weight": (32, 64),
        "drafter.rnn_u.bias": (32,),
        "drafter.rnn_w.weight": (32, 64),
    }


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_every_row_is_held_and_shares_are_equal(tp: int, kv_heads: int) -> None:
    config = with_tp(tp, num_attention_heads=8, num_key_value_heads=kv_heads, head_size=8, vocab_size=99)
    for spec in tensor_specs(config).values():
        parts = [rank_slice(spec, config, rank) for rank in range(tp)]
        assert len({part.shape(spec.shape) for part in parts}) == 1
        held = {row for part in parts for start, stop in part.rows for row in range(start, stop)}
        assert held == set(range(spec.shape[0]))
        if parts[0].cols is not None:
            columns = {c for part in parts if part.cols for c in range(*part.cols)}
            assert columns == set(range(spec.shape[1]))


def test_what_cannot_be_divided_is_listed_with_reasons() -> None:
    config = replace(
        parse(REDRAFTER | {"num_key_value_heads": 2, "intermediate_size": 160, "redrafter_exit_dim": 100}), tp_size=3
    )
    text = "\n".join(p.render() for p in divisibility_problems(config))
    for part in ("number of attention heads, 4", "intermediate size, 160", "drafter's hidden size, 64",
                 "exit_dim, 100", "2 KV heads cannot be divided by or repeated over 3"):  # fmt: skip
        assert part in text
    assert "vocabulary" not in text  # 96 / 3
    padded = replace(config, tp_size=2, vocab_size=97)
    assert "vocabulary (with a drafter), 97" in divisibility_problems(padded)[0].what
    assert divisibility_problems(replace(padded, drafter=None)) == []
