"""The networks of an engine: a chain of tokens (prompts, decoding without drafts) and a drafted step.

Both read and write one state per sequence (`STATE`) and the KV cache, and report what the host wants to know in one
[B, L + 4] int64 tensor, so that one small copy a step is all that crosses from the device. L is the longest draft:

    0 .. L      the tokens that were emitted, -1 past them
    L + 1       their number; 0: the logits were not finite, and nothing was committed
    L + 2       1 if the drafter's scores were finite, so that its drafts were used
    L + 3       1 if any row of logits was not finite: the cache needs to be cleaned

A drafted step is: search from (context, root) -> base pass over root and drafts -> draw at every node -> accept the
longest run -> new (context, root, base, source). The search comes first, so that nothing is drafted after a text's end.
"""

from __future__ import annotations

import numpy as np
import onnx

from trtllm_redrafter.backends.tensorrt.choice import choose
from trtllm_redrafter.backends.tensorrt.graph import INT64, Graph, Value
from trtllm_redrafter.backends.tensorrt.network import (
    Places,
    Sizes,
    base_pass,
    flag,
    head_logits,
    pick,
    search,
    tree_mask_table,
)
from trtllm_redrafter.redrafter.sampling import NOT_FINITE

STATE = ("root", "context", "base", "source")
"""Next token to compute [B], state of the last committed one [B, H], committed tokens [B], rows to move [B, P]."""

REPORT = "report"


def chain_network(sizes: Sizes) -> onnx.ModelProto:
    """`tokens` [B, T] of each sequence, one after the other: the token that follows the last."""
    graph = Graph()
    tokens = graph.input("tokens", INT64, ["batch", "tokens"])
    state = _State(graph, sizes)
    width = graph.op("Squeeze", graph.slice(graph.op("Shape", tokens), 0, 1, 2))
    steps = graph.op("Range", graph.integer(0), width, graph.integer(1))  # [T]
    positions = graph.op("Add", graph.op("Unsqueeze", state.base, graph.ints(1)), steps)
    behind = graph.op("Unsqueeze", _from_base(graph, sizes, state.base), graph.ints(1))  # [B, 1, S]
    seen = graph.op("LessOrEqual", behind, graph.op("Unsqueeze", steps, graph.ints(1)))  # [B, T, S]
    mask = graph.op("Unsqueeze", graph.op("And", seen, _committable(graph, sizes)), graph.ints(1))
    places = Places(positions, mask, state.base, state.source)
    states = base_pass(graph, sizes, tokens, state.active, places)
    shape = graph.op("Concat", graph.op("Shape", tokens), graph.ints(sizes.config.hidden_size), axis=0)
    last = graph.slice(graph.op("Reshape", states, shape), 1, -1, np.iinfo(np.int64).max)
    last = graph.reshape(last, -1, sizes.config.hidden_size)
    draws = choose(graph, sizes, head_logits(graph, sizes, last), np.zeros(1, np.int64))  # [B, 1]
    drawn = graph.reshape(draws, -1)
    good = graph.op("And", state.active, graph.op("Not", graph.op("Equal", drawn, graph.integer(NOT_FINITE))))
    old = graph.reshape(graph.slice(tokens, 1, -1, np.iinfo(np.int64).max), -1)
    base = graph.op("Where", state.active, graph.op("Add", state.base, width), state.base)
    state.write(
        root=graph.op("Where", good, drawn, old),
        context=graph.op("Where", graph.reshape(good, -1, 1), last, state.context),
        base=base,
        source=_in_place(graph, sizes, base),
    )
    count = graph.cast(good, INT64)
    emitted = graph.op("Where", graph.reshape(good, -1, 1), draws, graph.integer(-1))
    if sizes.moved:
        emitted = graph.op("Pad", emitted, graph.ints(0, 0, 0, sizes.moved), graph.integer(-1))
    sound = graph.op("Equal", count, count)
    _report(graph, sizes, emitted, count, sound, graph.op("Equal", drawn, graph.integer(NOT_FINITE)))
    return graph.model()


def draft_network(sizes: Sizes) -> onnx.ModelProto:
    """One step of drafting, verification and acceptance for all active sequences."""
    assert sizes.draft is not None
    beams, length, nodes = sizes.draft.num_beams, sizes.draft.draft_len, sizes.draft.max_tree_tokens
    graph = Graph()
    root = graph.input("root", INT64, ["batch"])
    state = _State(graph, sizes)
    found = search(graph, sizes, state.context, root)
    used = graph.op("And", graph.op("And", found.finite, flag(graph, "drafted")), state.active)
    columns = graph.op("Unsqueeze", root, graph.ints(1))
    drafts = graph.op("Where", graph.reshape(used, -1, 1, 1), found.tokens, graph.reshape(root, -1, 1, 1))
    tokens = graph.op("Concat", columns, graph.reshape(drafts, -1, beams * length), axis=1)  # [B, T]
    depths = np.concatenate([[0], np.tile(np.arange(1, length + 1), beams)]).astype(np.int64)
    positions = graph.op("Add", graph.op("Unsqueeze", state.base, graph.ints(1)), graph.constant(depths))
    places = Places(positions, _tree_mask(graph, sizes, state.base), state.base, state.source)
    states = base_pass(graph, sizes, tokens, state.active, places)
    draws = choose(graph, sizes, head_logits(graph, sizes, states), depths)  # [B, T]
    accepted, beam = _accept(graph, sizes, drafts, draws, used)
    behind = graph.op(
        "Add", graph.op("Mul", beam, graph.integer(length)), accepted
    )  # number of the last node, if not root
    last = graph.op("Where", graph.op("Equal", accepted, graph.integer(0)), graph.integer(0), behind)
    at_last = graph.op("Unsqueeze", last, graph.ints(1))
    drawn = graph.reshape(pick(graph, draws, at_last), -1)
    good = graph.op("And", state.active, graph.op("Not", graph.op("Equal", drawn, graph.integer(NOT_FINITE))))
    count = graph.op("Mul", graph.op("Add", accepted, graph.integer(1)), graph.cast(good, INT64))
    base = graph.op("Add", state.base, count)
    context = graph.reshape(pick(graph, graph.reshape(states, -1, nodes, sizes.config.hidden_size), at_last),
                            -1, sizes.config.hidden_size)  # fmt: skip
    state.write(
        root=graph.op("Where", good, drawn, root),
        context=graph.op("Where", graph.reshape(good, -1, 1), context, state.context),
        base=base,
        source=_moves(graph, sizes, state.base, base, count, beam),
    )
    emitted = _emitted(graph, sizes, drafts, beam, count, drawn)
    bad = graph.op("Equal", draws, graph.integer(NOT_FINITE))
    bad = graph.op("ReduceMax", graph.cast(bad, INT64), graph.ints(1), keepdims=0)
    _report(graph, sizes, emitted, count, found.finite, graph.op("Equal", bad, graph.integer(1)))
    return graph.model()


class _State:
    """State inputs that both networks have, and the outputs they become."""

    def __init__(self, graph: Graph, sizes: Sizes) -> None:
        self._graph, self._sizes = graph, sizes
        self.active = flag(graph, "active")
        self.base = graph.input("base", INT64, ["batch"])
        self.context = graph.input("context", sizes.element, ["batch", sizes.config.hidden_size])
        self.source = graph.input("source", INT64, ["batch", sizes.moved]) if sizes.moved else None

    def write(self, *, root: Value, context: Value, base: Value, source: Value | None) -> None:
        graph, sizes = self._graph, self._sizes
        graph.output("root.out", root, INT64, ["batch"])
        graph.output("context.out", context, sizes.element, ["batch", sizes.config.hidden_size])
        graph.output("base.out", base, INT64, ["batch"])
        if source is not None:
            graph.output("source.out", source, INT64, ["batch", sizes.moved])


def _from_base(graph: Graph, sizes: Sizes, base: Value) -> Value:
    """[B, S]: how far behind the first new row each cache position is; negative before it."""
    places = graph.constant(np.arange(sizes.capacity, dtype=np.int64) - sizes.moved)
    return graph.op("Sub", places, graph.op("Unsqueeze", base, graph.ints(1)))


def _committable(graph: Graph, sizes: Sizes) -> Value:
    """[S] bool: all positions but the spare ones."""
    return graph.constant(np.arange(sizes.capacity) >= sizes.moved)


def _tree_mask(graph: Graph, sizes: Sizes, base: Value) -> Value:
    """[B, 1, T, S]: committed positions, ancestors and the node itself."""
    assert sizes.draft is not None
    nodes = sizes.draft.max_tree_tokens
    behind = _from_base(graph, sizes, base)  # [B, S]
    before = graph.op("Where", _committable(graph, sizes), graph.integer(nodes + 1), graph.integer(nodes))
    row = graph.op(
        "Where", graph.op("Less", behind, graph.integer(0)), before, graph.op("Min", behind, graph.integer(nodes))
    )
    table = graph.constant(tree_mask_table(sizes.draft))
    mask = graph.op("Transpose", graph.op("Gather", table, row), perm=[0, 2, 1])  # [B, T, S]
    return graph.op("Unsqueeze", mask, graph.ints(1))


def _accept(graph: Graph, sizes: Sizes, drafts: Value, draws: Value, used: Value) -> tuple[Value, Value]:
    """Drafts [B, K, L] and draws [B, T] -> accepted drafts [B], and the lowest beam that has as many."""
    assert sizes.draft is not None
    beams, length = sizes.draft.num_beams, sizes.draft.draft_len
    at_nodes = graph.reshape(graph.slice(draws, 1, 1, 1 + beams * length), -1, beams, length)
    at_root = graph.op("Expand", graph.reshape(_draws_root(graph, draws), -1, 1, 1), graph.ints(1, beams, 1))
    parents = at_root
    if length > 1:
        parents = graph.op("Concat", at_root, graph.slice(at_nodes, 2, 0, length - 1), axis=2)
    hit = graph.op("And", graph.op("Equal", drafts, parents), graph.reshape(used, -1, 1, 1))
    missed = graph.op("CumSum", graph.cast(graph.op("Not", hit), INT64), graph.integer(2))
    alive = graph.cast(graph.op("Equal", missed, graph.integer(0)), INT64)
    runs = graph.op("ReduceSum", alive, graph.ints(2), keepdims=0)  # [B, K]
    order = graph.constant(np.arange(beams - 1, -1, -1, dtype=np.int64))  # prefers the lowest beam
    key = graph.op("Add", graph.op("Mul", runs, graph.integer(beams)), order)
    key = graph.op("ReduceMax", key, graph.ints(1), keepdims=0)
    accepted = graph.op("Div", key, graph.integer(beams))
    rest = graph.op("Sub", key, graph.op("Mul", accepted, graph.integer(beams)))
    return accepted, graph.op("Sub", graph.integer(beams - 1), rest)


def _draws_root(graph: Graph, draws: Value) -> Value:
    """The draw at every root, [B, 1]."""
    return graph.slice(draws, 1, 0, 1)


def _emitted(graph: Graph, sizes: Sizes, drafts: Value, beam: Value, count: Value, drawn: Value) -> Value:
    """[B, P + 1]: accepted drafts, the drawn token, -1."""
    assert sizes.draft is not None
    length = sizes.draft.draft_len
    taken = graph.reshape(pick(graph, drafts, graph.op("Unsqueeze", beam, graph.ints(1))), -1, length)
    taken = graph.op("Pad", taken, graph.ints(0, 0, 0, sizes.moved + 1 - length), graph.integer(-1))
    last = graph.op("Unsqueeze", graph.op("Sub", count, graph.integer(1)), graph.ints(1))
    place = graph.ints(*range(sizes.moved + 1))
    rest = graph.op(
        "Where", graph.op("Equal", place, last), graph.op("Unsqueeze", drawn, graph.ints(1)), graph.integer(-1)
    )
    return graph.op("Where", graph.op("Less", place, last), taken, rest)


def _in_place(graph: Graph, sizes: Sizes, base: Value) -> Value | None:
    """[B, P]: the last P committed rows, where they are."""
    if not sizes.moved:
        return None
    return graph.op("Add", graph.op("Unsqueeze", base, graph.ints(1)), graph.ints(*range(sizes.moved)))


def _moves(graph: Graph, sizes: Sizes, before: Value, base: Value, count: Value, beam: Value) -> Value:
    """[B, P]: where the last P committed rows are after a drafted step; accepted drafts are still in their beam."""
    assert sizes.draft is not None
    moved, length = sizes.moved, sizes.draft.draft_len
    still = _in_place(graph, sizes, base)
    assert still is not None
    depth = graph.op("Add", graph.op("Unsqueeze", count, graph.ints(1)), graph.ints(*range(-moved, 0)))
    first = graph.op("Add", graph.op("Add", before, graph.integer(moved)), graph.op("Mul", beam, graph.integer(length)))
    drafted = graph.op("Add", graph.op("Unsqueeze", first, graph.ints(1)), depth)
    return graph.op("Where", graph.op("Greater", depth, graph.integer(0)), drafted, still)


def _report(graph: Graph, sizes: Sizes, emitted: Value, count: Value, sound: Value, bad: Value) -> None:
    columns = [
        graph.op("Unsqueeze", x, graph.ints(1)) for x in (count, graph.cast(sound, INT64), graph.cast(bad, INT64))
    ]
    graph.output(REPORT, graph.op("Concat", emitted, *columns, axis=1), INT64, ["batch", sizes.moved + 4])
