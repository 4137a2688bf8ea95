"""Both rules: `exact` by hand, against a plain sampler and by its frequencies; `trtllm` in its corner cases."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.redrafter.toy import ToyBase, make_beams, random_drafter
from trtllm_redrafter.redrafter.beam_search import Beams, beam_search
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.reference import (
    RULES,
    DraftRecord,
    TokenTree,
    VerifyInput,
    build_tree,
    node_uniforms,
    trtllm_decide,
    walk,
)
from trtllm_redrafter.redrafter.sampling import SamplingSettings, draw, filtered_logits, uniform

G = 9


@dataclass(frozen=True)
class Row:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


TREE = [[G, 5, 9], [G, 5, 7], [G, 6, 9]]
#        0  1  2        3      4  5


@pytest.mark.parametrize(
    ("draws", "path", "emitted"),
    [
        ([8, 7, 1, 1, 9, 1], [0, -1, -1], [8, -1, -1]),  # nothing drafted was drawn
        ([5, 7, 1, 2, 9, 1], [0, 1, 3], [5, 7, 2]),
        ([6, 7, 1, 2, 9, 3], [0, 4, 5], [6, 9, 3]),
        ([6, 9, 1, 2, 7, 3], [0, 4, -1], [6, 7, -1]),  # 5→9 exists, but 6 was drawn: its 9 counts, not 5's
        ([5, 0, 1, 2, 9, 3], [0, 1, -1], [5, 0, -1]),  # token 0, as in padding
    ],
)
def test_walk_by_eye(draws: list[int], path: list[int], emitted: list[int]) -> None:
    tree = build_tree(make_beams([TREE]), width=8)
    output = walk(tree, torch.tensor([[*draws, 0, 0]]))
    accepted = sum(node >= 0 for node in path) - 1
    assert output.path.tolist() == [path]
    assert output.emitted.tolist() == [emitted]
    assert output.accepted.tolist() == [accepted]
    assert output.next_token.tolist() == [emitted[accepted]]
    assert output.last_node.tolist() == [path[accepted]]


def test_walk_over_unequal_trees() -> None:
    tree = build_tree(make_beams([TREE, TREE, TREE]), max_nodes=torch.tensor([1, 6, 6]))
    draws = torch.tensor([[5, 0, 0, 0, 0, 0], [5, 9, 4, 0, 0, 0], [3, 0, 0, 0, 0, 0]])
    output = walk(tree, draws)
    assert output.accepted.tolist() == [0, 2, 0]
    assert output.emitted.tolist() == [[5, -1, -1], [5, 9, 4], [3, -1, -1]]


def test_a_root_alone_emits_one_token() -> None:
    trees = build_tree(make_beams([[[4, 1]], [[5, 1]]]), max_nodes=1)
    output = walk(trees, torch.tensor([[7], [8]]))
    assert output.emitted.tolist() == [[7], [8]] and output.accepted.tolist() == [0, 0]


VOCAB = 6


class Drafts:
    """A random drafter over the toy vocabulary; its context vector is a function of the last token."""

    def __init__(self, seed: int, shape: DraftShape) -> None:
        self.drafter = random_drafter(VOCAB, seed=seed)
        self.embedding = torch.randn(VOCAB, 8)
        self.shape = shape

    def tree(self, last: int, max_nodes: int | None) -> TokenTree:
        context = self.embedding[last : last + 1].flip(1)
        beams = beam_search(self.drafter, self.embedding, context, torch.tensor([last]), self.shape)
        return build_tree(beams, max_nodes=max_nodes, width=12 if max_nodes else None)


def plain(base: ToyBase, row: Row, seed: int, count: int) -> list[int]:
    """The plain sampler: one token at a time, from [1, V] logits."""
    text = [0, 1]
    for position in range(count):
        logits = base.logits(text[-2], text[-1]).unsqueeze(0)
        text.append(int(draw(logits, SamplingSettings.of([row]), uniform(seed, position))))
    return text[2:]


def speculative(base: ToyBase, row: Row, seed: int, count: int, drafts: Drafts, max_nodes: int | None) -> list[int]:
    settings_ = SamplingSettings.of([row])
    text = [0, 1, int(draw(base.logits(0, 1).unsqueeze(0), settings_, uniform(seed, 0)))]
    while len(text) - 2 < count:
        tree = drafts.tree(text[-1], max_nodes)
        numbers = node_uniforms(tree, [seed], torch.tensor([len(text) - 2]))
        output = RULES["exact"](VerifyInput(tree, base.tree_logits(text[-2], tree), settings_, numbers))
        text += output.emitted[0, : int(output.accepted) + 1].tolist()
    return text[2 : 2 + count]


@settings(max_examples=60, deadline=None)
@given(
    row=st.builds(
        Row,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 2, 4]),
        top_p=st.sampled_from([0.3, 0.8, 1.0]),
    ),
    seed=st.integers(0, 2**63 - 1),
    model_seed=st.integers(0, 10**6),
    beams=st.integers(1, 5),
    length=st.integers(1, 4),
    max_nodes=st.none() | st.integers(1, 12),
)
def test_speculative_equals_plain_token_for_token(
    row: Row, seed: int, model_seed: int, beams: int, length: int, max_nodes: int | None
) -> None:
    base = ToyBase(VOCAB, seed=model_seed)
    drafts = Drafts(model_seed, DraftShape(beams, length))
    assert speculative(base, row, seed, 12, drafts, max_nodes) == plain(base, row, seed, 12)


def test_emitted_tokens_follow_the_base_models_distribution() -> None:
    """Pairs of tokens over 6,000 seeds against their exact probabilities, by chi-square at five sigma."""
    n, row = 6000, Row(0.8, 5, 0.9)
    base, drafts = ToyBase(VOCAB, seed=4, sharpness=1.0), Drafts(4, DraftShape(3, 2))
    settings_ = SamplingSettings.of([row])

    def probs(before: int, last: int) -> list[float]:
        values: list[float] = filtered_logits(base.logits(before, last).unsqueeze(0), settings_)[0].softmax(0).tolist()
        return values

    tree = drafts.tree(1, None)
    logits = base.tree_logits(0, tree)
    seeds = list(range(n))
    many = TokenTree(**{k: v.expand(n, *v.shape[1:]) for k, v in vars(tree).items()})
    numbers = node_uniforms(many, seeds, torch.zeros(n, dtype=torch.int64))
    output = RULES["exact"](VerifyInput(many, logits.expand(n, -1, -1), SamplingSettings.of([row] * n), numbers))
    pairs: Counter[tuple[int, int]] = Counter()
    for i, emitted in enumerate(output.emitted[:, :2].tolist()):
        first, second = emitted
        if second < 0:  # the step stopped: the next step draws with the next number
            second = int(draw(base.logits(1, first).unsqueeze(0), settings_, uniform(seeds[i], 1)))
        pairs[first, second] += 1
    expected = {(a, b): probs(0, 1)[a] * probs(1, a)[b] * n for a, b in product(range(VOCAB), repeat=2)}
    assert all(pairs[pair] == 0 for pair, count in expected.items() if count == 0.0)
    cells = [pair for pair, count in expected.items() if count > 5]
    chi_square = sum((pairs[c] - expected[c]) ** 2 / expected[c] for c in cells)
    freedom = len(cells) - 1
    assert freedom > 8 and chi_square < freedom + 5 * (2 * freedom) ** 0.5
    assert 0 < float(output.accepted.float().mean()) < 2  # both outcomes took part in the test


def one_draft(p: list[float], q: list[float], token: int, numbers: list[float]) -> VerifyInput:
    """TensorRT-LLM's rule on trees of one draft, one tree per random number pair."""
    n = len(numbers)
    tree = build_tree(make_beams([[[1, token]]] * n))
    logits = torch.tensor(p).log().expand(n, 2, -1)
    record = DraftRecord(
        tokens=torch.tensor([[[1, token]]] * n),
        log_probs=torch.tensor(q).log().expand(n, 1, 1, -1),
        rand_validation=torch.tensor(numbers).view(n, 1, 1),
        rand_sample=torch.tensor(random.Random(3).choices([(i + 0.5) / 1000 for i in range(1000)], k=n)),
        inverse_temperature=torch.ones(n),
        greedy=False,
    )
    return VerifyInput(tree, logits, SamplingSettings.of([]), None, record)


def test_trtllm_rule_leans_towards_the_drafter() -> None:
    """p = (.5, .5), q = (.6, .4), token 0 drafted: comes out with 5/6, not 1/2. The reason `exact` is the default."""
    n = 6000
    step = one_draft([0.5, 0.5], [0.6, 0.4], 0, [(i + 0.5) / n for i in range(n)])
    first = RULES["trtllm"](step).emitted[:, 0]
    assert float((first == 0).float().mean()) == pytest.approx(5 / 6, abs=1e-3)


def test_trtllm_rule_accepts_strictly_below_the_ratio() -> None:
    step = one_draft([0.25, 0.75], [0.5, 0.5], 0, [0.49, 0.5, 0.51])
    assert trtllm_decide(step).accepted.tolist() == [1, 0, 0]


def test_trtllm_rule_draws_token_zero_when_no_mass_is_left() -> None:
    """A certain drafter and a random number of 1: the right token is refused and the residual is empty."""
    step = one_draft([0.0, 1.0], [0.0, 1.0], 1, [1.0])
    output = RULES["trtllm"](step)
    assert output.accepted.tolist() == [0] and output.next_token.tolist() == [0]


def test_trtllm_greedy_equals_the_walk_without_ties() -> None:
    generator = torch.Generator().manual_seed(8)
    drafter, embedding = random_drafter(40, seed=8), torch.randn(40, 8)
    beams = beam_search(drafter, embedding, torch.randn(16, 8), torch.arange(16), DraftShape(4, 3), keep_log_probs=True)
    tree = build_tree(beams)
    logits = torch.randn(16, tree.width, 40, generator=generator)
    likely = build_tree(Beams(beams.tokens, beams.path_scores, None)).tokens  # make drafted tokens the argmax often
    children = tree.parents.clamp(min=0)
    logits[torch.arange(16).unsqueeze(1), children, likely] += 6.0 * torch.rand(16, tree.width, generator=generator)
    assert beams.log_probs is not None
    record = DraftRecord(
        beams.tokens, beams.log_probs, torch.rand(16, 4, 3) * 0.99, torch.rand(16) * 0.98 + 0.01, torch.ones(16), True
    )
    settings_ = SamplingSettings.of([Row(temperature=0.0)] * 16)
    walked, ratio = (RULES[name](VerifyInput(tree, logits, settings_, None, record)) for name in ("exact", "trtllm"))
    assert walked.accepted.tolist() == ratio.accepted.tolist()
    assert walked.emitted.tolist() == ratio.emitted.tolist()
    assert len(set(walked.accepted.tolist())) > 1


def test_trtllm_rule_needs_its_inputs() -> None:
    tree = build_tree(make_beams([[[1, 0]]]), max_nodes=1)
    with pytest.raises(TypeError, match="random numbers"):
        RULES["trtllm"](VerifyInput(tree, torch.zeros(1, 1, 4), SamplingSettings.of([]), None))
    step = one_draft([0.5, 0.5], [0.5, 0.5], 0, [0.5])
    cut = build_tree(make_beams([[[1, 0]]]), max_nodes=1, width=2)
    with pytest.raises(ValueError, match="without max_nodes"):
        RULES["trtllm"](VerifyInput(cut, step.logits, step.settings, None, step.draft))
