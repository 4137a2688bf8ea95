"""The base model and the drafter's search as ONNX operators, with the weights as inputs.

Rows are tokens: [rows, H] between the layers, [B, heads, T, D] within attention. Rounding follows the torch backend:
norms in float32, everything else in the model's dtype.

The KV cache of a layer is [B, N_kv, capacity, D] and written in place, once per pass: TensorRT refuses a second update
of one cache in one network. Drafts of a step that were accepted are therefore moved to their final places by the next
one, in the same update that stores its own keys and values:

    cache      | spare P | committed ........ | tree of the last step, of which some nodes are accepted
    update                        [ P moved   | T new ]
                                              ^ spare + base

The P rows before the new ones are read from `source` [B, P], cache positions: those that are in place name themselves.
`spare` positions at the front, which nobody attends to, make room for the update of an empty sequence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from trtllm_redrafter.backends.tensorrt.graph import BOOL, ELEMENT_TYPES, FLOAT, FLOAT8, INT64, Graph, Shape, Value
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.layout import tensor_specs
from trtllm_redrafter.checkpoint.names import DRAFTER, EMBEDDING, LM_HEAD, LN_F, layer_prefix
from trtllm_redrafter.checkpoint.reader import FP8_SCALE
from trtllm_redrafter.redrafter.config import CUT, TOP_CANDIDATES, DraftShape

COSINE, SINE = "rotary.cosine", "rotary.sine"
"""[positions, D / 2] in the model's dtype."""

TOKEN_IDS = "token_ids"
"""[V] int32: 0, 1, 2, ..., given from outside because a compiler would store it in every engine."""

DRAFT_ROWS = "draft_rows"
"""[R] int64: the token ids that the drafter's LM head is cut to."""

DRAFT_HEAD = DRAFTER + LM_HEAD
_TIE_MARGIN = 14
"""Candidates read beyond the 50 that are kept, among which ties with the 50th are found."""

_MASKED = -1e30


@dataclass(frozen=True)
class Sizes:
    """What a network is compiled for, beside the model's config.

    `moved` is P: the longest draft of all networks that share a cache. `draft` None: a chain of tokens per sequence.
    """

    config: CheckpointConfig
    names: Collection[str]
    """Tensors of the checkpoint: which biases there are."""
    capacity: int
    moved: int
    draft: DraftShape | None
    draft_rows: int | None
    fused_attention: bool
    sampled: bool
    float8: Collection[str] = ()
    """Weights that are stored as FP8 with one scale each; they are multiplied by it where they are used."""

    @property
    def element(self) -> int:
        return ELEMENT_TYPES[self.config.dtype]


class Weights:
    """Inputs of a graph that are tensors of the checkpoint, by the checkpoint's names."""

    def __init__(self, graph: Graph, sizes: Sizes) -> None:
        self._graph, self._sizes = graph, sizes
        self._specs = tensor_specs(sizes.config)

    def get(self, name: str) -> Value:
        shape = self._specs[name].shape
        if name == DRAFT_HEAD and self._sizes.draft_rows is not None:
            shape = (self._sizes.draft_rows, *shape[1:])
        return self._graph.input(name, self._sizes.element, shape)

    def linear(self, x: Value, module: str) -> Value:
        """[rows, inner] -> [rows, outer], with a bias where the checkpoint has one."""
        bias, weight = f"{module}.bias", f"{module}.weight"
        matrix = self._dequantized(module) if weight in self._sizes.float8 else self.get(weight)
        inputs = [x, matrix, *([self.get(bias)] if bias in self._sizes.names else [])]
        return self._graph.op("Gemm", *inputs, transB=1)

    def _dequantized(self, module: str) -> Value:
        """A weight in the model's dtype, from 8 bits and a scale: rounded as `Checkpoint.load` does."""
        graph, weight = self._graph, f"{module}.weight"
        stored = graph.input(weight, FLOAT8, self._specs[weight].shape)
        scale = graph.input(f"{module}.{FP8_SCALE}", FLOAT, [])
        return graph.cast(graph.op("DequantizeLinear", stored, scale), self._sizes.element)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a pass are: all that attention needs beside queries, keys and values."""

    positions: Value  # [B, T] int64, for the rotary embedding
    mask: Value  # [B, 1, T, capacity] bool
    base: Value  # [B] int64, committed tokens
    source: Value | None  # [B, P] int64 cache positions of the rows to move; None where P is 0


def base_pass(graph: Graph, sizes: Sizes, tokens: Value, active: Value, places: Places) -> Value:
    """Tokens [B, T] -> states [B T, H] after the final norm; rows of inactive sequences are computed from zeros."""
    config, weights = sizes.config, Weights(graph, sizes)
    x = graph.op("Gather", weights.get(EMBEDDING), tokens)
    x = graph.op("Where", graph.reshape(active, -1, 1, 1), x, zero(graph, sizes.element))
    x = graph.reshape(x, -1, config.hidden_size)
    layer_shape = _Shapes(graph, sizes, tokens)
    source = None if places.source is None else _source_index(graph, config, places.source)
    for index in range(config.num_hidden_layers):
        prefix = layer_prefix(index)
        normed = _norm(graph, sizes, x, weights.get(prefix + "input_layernorm.weight"))
        mixed = _attention(graph, sizes, weights, index, normed, places, source, layer_shape)
        x = graph.op("Add", x, weights.linear(mixed, prefix + "attention.dense"))
        normed = _norm(graph, sizes, x, weights.get(prefix + "post_layernorm.weight"))
        gate = silu(graph, weights.linear(normed, prefix + "mlp.fc"))
        gated = graph.op("Mul", gate, weights.linear(normed, prefix + "mlp.gate"))
        x = graph.op("Add", x, weights.linear(gated, prefix + "mlp.proj"))
    return _norm(graph, sizes, x, weights.get(LN_F))


def head_logits(graph: Graph, sizes: Sizes, states: Value) -> Value:
    """[rows, H] -> float32 [rows, V]."""
    return graph.cast(Weights(graph, sizes).linear(states, "lm_head"), FLOAT)


CACHES = ("keys.", "values.")
"""What the names of KV cache tensors begin with."""


def cache_names(config: CheckpointConfig) -> list[str]:
    """The KV cache tensors, which are both input and (as NAME.out) output of every network."""
    return [f"{kind}{index}" for index in range(config.num_hidden_layers) for kind in CACHES]


class _Shapes:
    """Target shapes that depend on the number of tokens, made once."""

    def __init__(self, graph: Graph, sizes: Sizes, tokens: Value) -> None:
        config = sizes.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = graph.op("Shape", tokens)
        batch, width = graph.slice(rows, 0, 0, 1), graph.slice(rows, 0, 1, 2)
        size = config.head_size
        self.split = graph.op("Concat", rows, graph.ints(heads + 2 * kv_heads, size), axis=0)
        groups = graph.ints(kv_heads, heads // kv_heads)
        self.stacked = graph.op("Concat", batch, graph.ints(kv_heads, -1, size), axis=0)
        self.grouped = graph.op("Concat", batch, groups, width, graph.ints(sizes.capacity), axis=0)
        self.flat = graph.op("Concat", batch, graph.ints(kv_heads, -1, sizes.capacity), axis=0)
        self.mixed = graph.op("Concat", batch, graph.ints(heads), width, graph.ints(size), axis=0)


def _attention(
    graph: Graph,
    sizes: Sizes,
    weights: Weights,
    index: int,
    x: Value,
    places: Places,
    source: Value | None,
    shapes: _Shapes,
) -> Value:
    """[rows, H] -> [rows, N D], with the layer's keys and values stored."""
    config, prefix = sizes.config, layer_prefix(index) + "attention."
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    qkv = graph.op("Reshape", weights.linear(x, prefix + "qkv"), shapes.split)
    qkv = graph.op("Transpose", qkv, perm=[0, 2, 1, 3])
    query, key, value = graph.ops("Split", 3, qkv, graph.ints(heads, kv_heads, kv_heads), axis=1)
    if config.has_qk_norm:
        query = _norm(graph, sizes, query, weights.get(prefix + "q_layernorm.weight"))
        key = _norm(graph, sizes, key, weights.get(prefix + "k_layernorm.weight"))
    query, key = (_rotate(graph, sizes, part, places.positions) for part in (query, key))
    keys = _update(graph, sizes, f"keys.{index}", key, places.base, source)
    values = _update(graph, sizes, f"values.{index}", value, places.base, source)
    scale = config.head_size**-0.5
    if sizes.fused_attention:
        mixed = graph.op("Attention", query, keys, values, places.mask, scale=scale)
    else:
        mixed = _plain_attention(graph, sizes, (query, keys, values), places.mask, shapes)
    return graph.reshape(graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), -1, heads * config.head_size)


def _plain_attention(
    graph: Graph, sizes: Sizes, inputs: tuple[Value, Value, Value], mask: Value, shapes: _Shapes
) -> Value:
    """Attention from products and a softmax in float32, for dtypes and head sizes that no compiled kernel has."""
    query, keys, values = inputs
    stacked = graph.op("Reshape", query, shapes.stacked)  # [B, N_kv, G T, D]
    scores = graph.op("MatMul", stacked, graph.op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = graph.op("Mul", graph.cast(scores, FLOAT), graph.real(sizes.config.head_size**-0.5))
    scores = graph.op("Reshape", scores, shapes.grouped)  # [B, N_kv, G, T, capacity]
    scores = graph.op("Where", graph.op("Unsqueeze", mask, graph.ints(1)), scores, graph.real(_MASKED))
    shares = graph.op("Reshape", graph.op("Softmax", scores, axis=-1), shapes.flat)
    mixed = graph.op("MatMul", graph.cast(shares, sizes.element), values)
    return graph.op("Reshape", mixed, shapes.mixed)


def _source_index(graph: Graph, config: CheckpointConfig, source: Value) -> Value:
    """[B, P] -> [B, N_kv, P, 1], the form in which GatherND reads rows of every head."""
    ones = graph.constant(np.ones((1, config.num_key_value_heads, 1, 1), np.int64))
    return graph.op("Mul", graph.op("Unsqueeze", source, graph.ints(1, 3)), ones)


def _update(graph: Graph, sizes: Sizes, name: str, new: Value, base: Value, source: Value | None) -> Value:
    """Store new rows [B, N_kv, T, D] behind those that are moved; the whole cache after it."""
    config = sizes.config
    shape: Shape = ["batch", config.num_key_value_heads, sizes.capacity, config.head_size]
    cache = graph.input(name, sizes.element, shape)
    if source is not None:
        moved = graph.op("GatherND", cache, source, batch_dims=2)
        new = graph.op("Concat", moved, new, axis=2)
    graph.op("TensorScatter", cache, new, base, out=f"{name}.out", axis=2, mode="linear")
    graph.declare(f"{name}.out", sizes.element, shape)
    return f"{name}.out"


def _norm(graph: Graph, sizes: Sizes, x: Value, weight: Value) -> Value:
    return graph.op("RMSNormalization", x, weight, axis=-1, epsilon=sizes.config.norm_epsilon)


def _rotate(graph: Graph, sizes: Sizes, x: Value, positions: Value) -> Value:
    shape = (sizes.config.max_position_embeddings, sizes.config.head_size // 2)
    cosine, sine = (graph.input(name, sizes.element, shape) for name in (COSINE, SINE))
    return graph.op("RotaryEmbedding", x, cosine, sine, positions)


def silu(graph: Graph, x: Value) -> Value:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def zero(graph: Graph, element: int) -> Value:
    return graph.cast(graph.real(0.0), element) if element != FLOAT else graph.real(0.0)


def pick(graph: Graph, rows: Value, index: Value) -> Value:
    """rows[b, index[b, k]]: [B, R, ...], [B, K] -> [B, K, ...]."""
    return graph.op("GatherND", rows, graph.op("Unsqueeze", index, graph.ints(2)), batch_dims=1)


def finite(graph: Graph, x: Value) -> Value:
    """[B, ...] float32 -> [B] bool: are all of a row's numbers finite?"""
    bad = graph.op("Or", graph.op("IsNaN", x), graph.op("IsInf", x))
    count = graph.op("ReduceSum", graph.reshape(graph.cast(bad, INT64), 0, -1), graph.ints(1), keepdims=0)
    return graph.op("Equal", count, graph.integer(0))


@dataclass(frozen=True)
class Drafts:
    """What a search found."""

    tokens: Value  # [B, K, L] int64, the first token left out
    finite: Value  # [B] bool


def search(graph: Graph, sizes: Sizes, context: Value, root: Value) -> Drafts:
    """`redrafter.beam_search` from states [B, H] and first tokens [B].

    One thing differs: where more than 14 tokens tie with the 50th of a round, those beyond are not kept.
    """
    config, shape, weights = sizes.config, sizes.draft, Weights(graph, sizes)
    assert shape is not None and config.drafter is not None
    last = graph.op("Unsqueeze", root, graph.ints(1))  # [B, rows]: one row until beams differ
    tokens: Value | None = None
    state: Value | None = None
    scores: Value | None = None
    sound: Value | None = None
    for _ in range(shape.draft_len):
        state = _next_state(graph, sizes, weights, last, state)
        columns, log_probs = _candidates(graph, sizes, _draft_logits(graph, sizes, weights, context, state))
        parents, column, scores = _best(graph, sizes, scores, log_probs)
        rows = graph.op("Mul", parents, graph.integer(0)) if tokens is None else parents
        state = pick(graph, state, rows)
        place = graph.op("Concat", *(graph.op("Unsqueeze", x, graph.ints(2)) for x in (rows, column)), axis=2)
        last = graph.op("GatherND", columns, place, batch_dims=1)  # [B, K]
        if sizes.draft_rows is not None:
            last = graph.op("Gather", graph.input(DRAFT_ROWS, INT64, [sizes.draft_rows]), last)
        new = graph.op("Unsqueeze", last, graph.ints(2))
        tokens = new if tokens is None else graph.op("Concat", pick(graph, tokens, rows), new, axis=2)
        good = finite(graph, scores)
        sound = good if sound is None else graph.op("And", sound, good)
    assert tokens is not None and sound is not None
    return Drafts(tokens, sound)


def _next_state(graph: Graph, sizes: Sizes, weights: Weights, tokens: Value, state: Value | None) -> Value:
    """States [B, R, H] after one more token each; None: the state of zeros before the first."""
    config = sizes.config
    assert config.drafter is not None
    embedded = graph.op("Gather", weights.get(EMBEDDING), tokens)  # [B, R, H]
    if not config.drafter.rnn:
        return embedded if state is None else graph.op("Add", embedded, state)
    flat = graph.reshape(embedded, -1, config.hidden_size)
    moved = weights.linear(flat, DRAFTER + "rnn_w")
    if state is None:
        moved = graph.op("Add", moved, weights.get(DRAFTER + "rnn_u.bias"))
    else:
        past = graph.reshape(state, -1, config.hidden_size)
        moved = graph.op("Add", moved, weights.linear(past, DRAFTER + "rnn_u"))
    rows = 1 if state is None else _beams(sizes)
    return graph.reshape(silu(graph, moved), -1, rows, config.hidden_size)


def _beams(sizes: Sizes) -> int:
    assert sizes.draft is not None
    return sizes.draft.num_beams


def _draft_logits(graph: Graph, sizes: Sizes, weights: Weights, context: Value, state: Value) -> Value:
    """Contexts [B, H] and states [B, R, H] -> float32 logits [B, R, columns]."""
    config, drafter = sizes.config, sizes.config.drafter
    assert drafter is not None
    beside = graph.op("Expand", graph.op("Unsqueeze", context, graph.ints(1)), graph.op("Shape", state))
    x = graph.reshape(graph.op("Concat", beside, state, axis=2), -1, 2 * config.hidden_size)
    if drafter.has_input_proj:
        x = weights.linear(x, DRAFTER + "input_proj")
    for layer in range(drafter.num_layers):
        x = graph.op("Add", x, silu(graph, weights.linear(x, f"{DRAFTER}layers.{layer}.linear")))
    logits = graph.cast(weights.linear(x, DRAFTER + "lm_head"), FLOAT)
    columns = sizes.draft_rows or config.vocab_size
    rows = graph.slice(graph.op("Shape", state), 0, 0, 2)
    return graph.op("Reshape", logits, graph.op("Concat", rows, graph.ints(columns), axis=0))


def _width(sizes: Sizes) -> tuple[int, bool]:
    """Candidates that a round reads, and whether it cuts any."""
    columns = sizes.draft_rows or sizes.config.vocab_size
    cuts = sizes.config.vocab_size > TOP_CANDIDATES and columns >= TOP_CANDIDATES
    return (min(columns, TOP_CANDIDATES + _TIE_MARGIN) if cuts else columns), cuts


def _candidates(graph: Graph, sizes: Sizes, logits: Value) -> tuple[Value, Value]:
    """Logits [B, R, columns] -> columns and log-probabilities [B, R, C] of those that remain after the cut."""
    count, cuts = _width(sizes)
    values, columns = graph.ops("TopK", 2, logits, graph.ints(count), axis=2)
    values = graph.op("Sub", values, graph.slice(values, 2, 0, 1))
    if cuts:
        least = graph.slice(values, 2, TOP_CANDIDATES - 1, TOP_CANDIDATES)
        values = graph.op("Where", graph.op("Less", values, least), graph.real(CUT), values)
    mass = graph.op("ReduceSum", graph.op("Exp", values), graph.ints(2), keepdims=1)
    return columns, graph.op("Sub", values, graph.op("Log", mass))


def _best(graph: Graph, sizes: Sizes, scores: Value | None, log_probs: Value) -> tuple[Value, Value, Value]:
    """Parent beams, candidates and scores [B, K] of the best continuations. Scores None: the first round."""
    width, beams = _width(sizes)[0], _beams(sizes)
    if scores is None:  # only beam 0 exists
        start = np.full((1, beams, 1), CUT, np.float32)
        start[:, 0] = 0.0
        total = graph.op("Add", log_probs, graph.constant(start))
    else:
        total = graph.op("Add", graph.op("Unsqueeze", scores, graph.ints(2)), log_probs)
    best, flat = graph.ops("TopK", 2, graph.reshape(total, -1, beams * width), graph.ints(beams), axis=1)
    parents = graph.op("Div", flat, graph.integer(width))
    return parents, graph.op("Sub", flat, graph.op("Mul", parents, graph.integer(width))), best


def tree_mask_table(shape: DraftShape) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """[T + 2, T] bool: entry [j, i]: node i attends to node j; then a row of False and a row of True.

    Nodes are the root and then each beam's tokens, beam by beam; beams that begin alike are not merged, since a
    network of fixed size would compute the places of merged nodes all the same.
    """
    nodes = shape.max_tree_tokens
    table = np.zeros((nodes + 2, nodes), np.bool_)
    table[0] = table[nodes + 1] = True
    for beam in range(shape.num_beams):
        first = 1 + beam * shape.draft_len
        for node in range(first, first + shape.draft_len):
            table[first : node + 1, node] = True
    return table


def flag(graph: Graph, name: str) -> Value:
    """A [B] bool input."""
    return graph.input(name, BOOL, ["batch"])
