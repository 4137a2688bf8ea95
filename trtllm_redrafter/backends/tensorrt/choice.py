"""The token that follows a row of logits: the largest one, or drawn with the request's own uniform number.

The rules are those of `redrafter.sampling`, without sorting: TensorRT's top-k ends at 3,840 entries, and vocabularies
do not. What top-k and top-p keep lies above a threshold, which sums over the row find.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtllm_redrafter.backends.tensorrt.graph import FLOAT, INT32, INT64, Graph, Value
from trtllm_redrafter.backends.tensorrt.network import TOKEN_IDS, Sizes
from trtllm_redrafter.redrafter.sampling import NOT_FINITE

_CUTS, _ROUNDS = 8, 13
"""Thresholds tried at once, and how often: 9^13 is 2^41, after which two float32 numbers are rarely that close."""

_DEEPEST = 1e5
"""Tokens whose scaled logits are further below the largest are never drawn, so that top-k may pass over them."""

_DEEP = 64.0
"""Logits this far below the largest add nothing to a float32 sum of probabilities."""


def choose(graph: Graph, sizes: Sizes, logits: Value, depths: NDArray[np.int64]) -> Value:
    """Float32 logits [B T, V] -> tokens [B, T]; `depths` [T] are the rows' places in the output, from this step on."""
    best = _greedy(graph, sizes, logits)
    if sizes.sampled:
        best = _sampled(graph, sizes, logits, best, depths)
    return graph.reshape(best, -1, len(depths))


def _greedy(graph: Graph, sizes: Sizes, logits: Value) -> Value:
    """`sampling.finite_greedy`; the lowest id on ties on every compiler, since a minimum of ids is taken."""
    vocab = sizes.config.vocab_size
    seen = graph.op("Where", graph.op("IsNaN", logits), graph.real(np.inf), logits)
    largest = graph.op("ReduceMax", seen, graph.ints(1), keepdims=1)
    ids = graph.input(TOKEN_IDS, INT32, [vocab])
    past = graph.constant(np.array(vocab, np.int32))
    held = graph.op("Where", graph.op("Equal", seen, largest), ids, past)
    best = graph.cast(graph.op("ReduceMin", held, graph.ints(1), keepdims=0), INT64)
    wrong = graph.reshape(graph.op("IsInf", largest), -1)
    return graph.op("Where", wrong, graph.integer(NOT_FINITE), best)


def _sampled(graph: Graph, sizes: Sizes, logits: Value, best: Value, depths: NDArray[np.int64]) -> Value:
    """`sampling.draw` with `temperature`, `top_k`, `top_p` [B] and `uniforms` [B, P + 1]; temperature 0 is greedy."""
    nodes = len(depths)
    temperature = _per_row(graph, graph.input("temperature", FLOAT, ["batch"]), nodes)
    top_p = _per_row(graph, graph.input("top_p", FLOAT, ["batch"]), nodes)
    top_k = _per_row(graph, graph.input("top_k", FLOAT, ["batch"]), nodes)
    uniforms = graph.input("uniforms", FLOAT, ["batch", sizes.moved + 1])
    uniform = graph.reshape(graph.op("Gather", uniforms, graph.constant(depths), axis=1), -1, 1)
    zero, one = graph.real(0.0), graph.real(1.0)
    hot = graph.op("Greater", temperature, zero)
    clean = graph.op("Where", graph.reshape(graph.op("Equal", best, graph.integer(NOT_FINITE)), -1, 1), zero, logits)
    clean = graph.op("Sub", clean, graph.op("ReduceMax", clean, graph.ints(1), keepdims=1))
    scaled = graph.op("Div", clean, graph.op("Where", hot, temperature, one))
    least = graph.op("Max", graph.op("ReduceMin", scaled, graph.ints(1), keepdims=1), graph.real(-_DEEPEST))
    limited = graph.op("Greater", top_k, zero)
    width = graph.op("Where", limited, top_k, graph.real(float(sizes.config.vocab_size)))
    floor = _threshold(graph, scaled, one, width, graph.op("Sub", least, one))
    kept = graph.op("Or", graph.op("Greater", scaled, floor), graph.op("Not", limited))
    scaled = graph.op("Where", kept, scaled, graph.real(-1e30))
    weights = graph.op("Exp", scaled)
    total = graph.op("ReduceSum", weights, graph.ints(1), keepdims=1)
    cut = graph.op("Less", top_p, one)
    each = graph.op("Unsqueeze", weights, graph.ints(2))
    floor = _threshold(graph, scaled, each, graph.op("Mul", top_p, total), graph.real(-_DEEP))
    kept = graph.op("Or", graph.op("Greater", scaled, floor), graph.op("Not", cut))
    weights = graph.op("Where", kept, weights, zero)
    running = graph.op("CumSum", weights, graph.integer(1))
    total = graph.slice(running, 1, -1, np.iinfo(np.int64).max)
    below = graph.op("LessOrEqual", running, graph.op("Mul", uniform, total))
    drawn = graph.op("ReduceSum", graph.cast(below, INT64), graph.ints(1), keepdims=0)
    drawn = graph.op("Min", drawn, graph.integer(sizes.config.vocab_size - 1))
    is_drawn = graph.op(
        "And", graph.reshape(hot, -1), graph.op("Not", graph.op("Equal", best, graph.integer(NOT_FINITE)))
    )
    return graph.op("Where", is_drawn, drawn, best)


def _per_row(graph: Graph, values: Value, nodes: int) -> Value:
    """[B] -> [B T, 1]."""
    wide = graph.op("Expand", graph.op("Unsqueeze", values, graph.ints(1)), graph.ints(1, nodes))
    return graph.reshape(wide, -1, 1)


def _threshold(graph: Graph, scaled: Value, weights: Value, wanted: Value, low: Value) -> Value:
    """[rows, 1]: a token is kept if it is above this; that is, if all larger ones together weigh less than `wanted`.

    The interval from `low` to 0, where the largest is, is cut into nine equal parts, and again. Halving it in a Loop is
    less arithmetic, but TensorRT-RTX 1.7 crashes on a Loop behind 30 layers with fused attention; unrolled, it does not
    finish within minutes.
    """
    low = graph.op("Add", low, graph.op("Mul", wanted, graph.real(0.0)))  # [rows, 1]
    step = graph.op("Mul", low, graph.real(-1.0 / (_CUTS + 1)))
    cuts = graph.constant(np.arange(1, _CUTS + 1, dtype=np.float32)[None])
    values = graph.op("Unsqueeze", scaled, graph.ints(2))
    for _ in range(_ROUNDS):
        tried = graph.op("Add", low, graph.op("Mul", step, cuts))  # [rows, cuts]
        thresholds = graph.op("Unsqueeze", tried, graph.ints(1))
        above = graph.op("Where", graph.op("Greater", values, thresholds), weights, graph.real(0.0))  # [rows, V, cuts]
        enough = graph.op("GreaterOrEqual", graph.op("ReduceSum", above, graph.ints(1), keepdims=0), wanted)
        # One that was tried, not a sum that rounding may have put on the other side of a token:
        low = graph.op("ReduceMax", graph.op("Where", enough, tried, low), graph.ints(1), keepdims=1)
        step = graph.op("Mul", step, graph.real(1.0 / (_CUTS + 1)))
    return low
