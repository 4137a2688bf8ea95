"""Trees as literal tables, and what holds for every tree."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.redrafter.toy import make_beams
from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.reference import TokenTree, build_tree, walk
from trtllm_redrafter.redrafter.token_tree import Tree, pad

G = 9  # the guaranteed token


def test_shared_prefixes_become_one_path() -> None:
    tree = build_tree(make_beams([[[G, 5, 9], [G, 5, 7], [G, 6, 9]]]))
    assert tree.tokens.tolist() == [[G, 5, 9, 7, 6, 9]]
    assert tree.parents.tolist() == [[-1, 0, 1, 1, 0, 4]]
    assert tree.depths.tolist() == [[0, 1, 2, 2, 1, 2]]
    assert tree.draft_indices.tolist() == [[[0, 1, 2], [0, 1, 3], [0, 4, 5]]]
    assert tree.mask[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],  # g
        [1, 1, 0, 0, 0, 0],  # 5
        [1, 1, 1, 0, 0, 0],  # 5 9
        [1, 1, 0, 1, 0, 0],  # 5 7
        [1, 0, 0, 0, 1, 0],  # 6
        [1, 0, 0, 0, 1, 1],  # 6 9
    ]


def test_unequal_trees_are_padded() -> None:
    tree = build_tree(make_beams([[[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [1, 4, 3]]]))
    assert tree.lengths.tolist() == [3, 5]
    assert tree.tokens.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 3]]
    assert tree.parents.tolist() == [[-1, 0, 1, -1, -1], [-1, 0, 1, 0, 3]]
    assert tree.draft_indices[0].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert tree.mask[0, 3:].int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_a_wider_bucket_adds_padding_only() -> None:
    beams = make_beams([[[1, 2, 3], [1, 4, 3]]])
    narrow, wide = build_tree(beams), build_tree(beams, width=8)
    assert wide.width == 8
    assert wide.tokens[:, :5].equal(narrow.tokens) and wide.mask[:, :5, :5].equal(narrow.mask)
    assert wide.is_node.tolist() == [[True] * 5 + [False] * 3]


def test_max_nodes_keeps_the_likeliest_with_their_parents() -> None:
    tokens = [[[G, 5, 9], [G, 5, 7], [G, 6, 9]]]
    scores = [[[0.0, -1.0, -2.0], [0.0, -1.0, -4.0], [0.0, -3.0, -5.0]]]
    tree = build_tree(make_beams(tokens, scores), max_nodes=4)
    assert tree.tokens.tolist() == [[G, 5, 9, 6]]
    assert tree.parents.tolist() == [[-1, 0, 1, 0]]
    assert tree.draft_indices.tolist() == [[[0, 1, 2], [0, 1, -1], [0, 3, -1]]]


def test_max_nodes_per_sequence() -> None:
    beams = make_beams([[[1, 2, 3]], [[1, 2, 3]], [[1, 2, 3]]])
    tree = build_tree(beams, max_nodes=torch.tensor([1, 2, 9]))
    assert tree.lengths.tolist() == [1, 2, 3]


def paths(tree: TokenTree, row: int) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for node in range(int(tree.lengths[row])):
        parent = int(tree.parents[row, node])
        found.append((*(found[parent] if parent >= 0 else ()), int(tree.tokens[row, node])))
    return found


beam_tables = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda size: st.lists(
        st.lists(st.lists(st.integers(0, 2), min_size=size[2], max_size=size[2]), min_size=size[1], max_size=size[1]),
        min_size=size[0],
        max_size=size[0],
    )
)


@settings(max_examples=60, deadline=None)
@given(table=beam_tables, limit=st.none() | st.integers(1, 12), seed=st.integers(0, 999))
def test_every_tree(table: list[list[list[int]]], limit: int | None, seed: int) -> None:
    rows = [[[G, *beam] for beam in beams] for beams in table]
    score_of: dict[tuple[int, ...], float] = {(G,): 0.0}
    generator = torch.Generator().manual_seed(seed)
    for beam in (beam for beams in rows for beam in beams):
        for j in range(1, len(beam)):
            step = float(torch.randint(0, 3, (), generator=generator))  # zero steps make ties with the parent
            score_of.setdefault(tuple(beam[: j + 1]), score_of[tuple(beam[:j])] - step)
    scores = [[[score_of[tuple(beam[: j + 1])] for j in range(len(beam))] for beam in beams] for beams in rows]
    tree = build_tree(make_beams(rows, scores), max_nodes=limit)
    for row, beams in enumerate(rows):
        prefixes = {tuple(beam[: j + 1]) for beam in beams for j in range(len(beam))}
        kept = paths(tree, row)
        assert len(set(kept)) == len(kept) == min(len(prefixes), limit or 99)
        assert set(kept) <= prefixes
        dropped = prefixes - set(kept)
        assert not dropped or max(score_of[p] for p in dropped) <= min(score_of[p] for p in kept)
        for node, path in enumerate(kept):
            ancestors = {i for i, other in enumerate(kept) if path[: len(other)] == other}
            assert set(tree.mask[row, node].nonzero().flatten().tolist()) == ancestors
            assert int(tree.depths[row, node]) == len(path) - 1
        for k, beam in enumerate(beams):
            for j, node in enumerate(tree.draft_indices[row, k].tolist()):
                path = tuple(beam[: j + 1])
                assert (kept[node] == path) if node >= 0 else (path in dropped)


@given(st.data())
def test_list_trees_equal_tensor_trees(data: st.DataObject) -> None:
    """`Tree.merge`, `paths` and `walk` agree with `build_tree`, its mask and `verification.walk`."""
    count, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    beams = [[1] + [data.draw(st.integers(0, 2)) for _ in range(length)] for _ in range(count)]
    tensors = build_tree(Beams(torch.tensor([beams]), torch.zeros(1, count, length + 1), None))
    tree = Tree.merge(beams)
    assert tree.tokens == tensors.tokens[0].tolist()
    assert tree.parents == tensors.parents[0].tolist()
    assert tree.depths == tensors.depths[0].tolist()
    assert tree.paths() == [row.nonzero().flatten().tolist() for row in tensors.mask[0]]
    draws = [data.draw(st.integers(0, 2)) for _ in range(len(tree))]
    output = walk(tensors, torch.tensor([draws]))
    path = tree.walk(draws)
    assert path == [node for node in output.path[0].tolist() if node >= 0]
    assert [draws[node] for node in path] == [t for t in output.emitted[0].tolist() if t >= 0]
    tokens, depths, mask = pad([tree, Tree.root(7)], torch.device("cpu"))
    assert torch.equal(tokens[0], tensors.tokens[0]) and torch.equal(depths[0], tensors.depths[0])
    assert torch.equal(mask[0], tensors.mask[0])
    assert tokens[1, 0] == 7 and mask[1, 0].sum() == 1
