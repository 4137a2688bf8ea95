"""The search kernel against PyTorch: logits by their error, the choice of beams exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.backends.torch.cuda.search import SearchKernel
from trtllm_redrafter.redrafter.beam_search import DraftHead, draft_head, search_rounds
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]


FIVE_BY_FOUR = DraftShape(5, 4)


@dataclass(frozen=True)
class Case:
    config: DrafterConfig
    shape: DraftShape = FIVE_BY_FOUR
    rows: int | None = None
    """Head rows; None: all."""
    head: str = "random"
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1


CASES = {
    "typical": Case(DrafterConfig(9000, 256, 320, 2), rows=8200, batch=3),
    "odd sizes": Case(DrafterConfig(2500, 128, 192, 1), DraftShape(3, 4), rows=2003, dtype=torch.float16),
    "no input": Case(DrafterConfig(300, 64, 128, 0), dtype=torch.float16, batch=2),
    "no recurrence": Case(DrafterConfig(9000, 256, 512, 2, rnn=False), DraftShape(4, 3), rows=8190, batch=2),
    "one beam": Case(DrafterConfig(9000, 256, 320, 1), DraftShape(1, 3)),
    "nine beams": Case(DrafterConfig(9000, 256, 320, 1), DraftShape(9, 3), batch=2),
    "low rank": Case(DrafterConfig(9000, 256, 512, 1), rows=8000, head="low rank"),
    "each logit thrice": Case(DrafterConfig(9000, 256, 320, 1), head="thrice"),
    "ties in their hundreds": Case(DrafterConfig(9000, 256, 320, 1), rows=8500, head="twenty"),
    "all tie": Case(DrafterConfig(9000, 256, 320, 1), rows=8500, head="zero"),
    "large": Case(DrafterConfig(40000, 1536, 768, 2), DraftShape(5, 5), rows=32768),
}


def build(case: Case) -> tuple[Drafter, Tensor, DraftHead]:
    generator = torch.Generator("cuda").manual_seed(7)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", generator=generator) * 1.5 / sizes[-1] ** 0.5

    config = case.config
    drafter = Drafter(config).to("cuda", case.dtype).requires_grad_(False)
    for parameter in drafter.parameters():
        parameter.copy_(random(*parameter.shape))
    order = torch.arange(config.vocab_size, device="cuda")
    head = drafter.lm_head.weight
    chosen = {"thrice": order // 3, "twenty": order % 20}.get(case.head, order)
    head.copy_(head[chosen] * (case.head != "zero"))
    embedding = (random(config.vocab_size, config.hidden_size) * config.hidden_size**0.5).to(case.dtype)
    rows = (
        None
        if case.rows is None
        else torch.randperm(config.vocab_size, device="cuda", generator=generator)[: case.rows]
    )
    if case.head != "low rank":
        return drafter, embedding, draft_head(drafter, rows)
    assert rows is not None
    base = random(len(rows), config.hidden_size).to(case.dtype)
    factor = random(config.hidden_size, config.exit_dim).to(case.dtype)
    project = lambda x: F.linear(F.linear(x, factor), base)  # noqa: E731
    return drafter, embedding, DraftHead(project, config.vocab_size, rows.sort().values, base, factor)


def inputs(case: Case, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(batch)
    contexts = torch.randn(batch, case.config.hidden_size, device="cuda", generator=generator).to(case.dtype)
    return contexts, torch.randint(case.config.vocab_size, (batch,), device="cuda", generator=generator)


def logits_of(search: SearchKernel, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The last round's, from the kernel's keys."""
    keys = search._buffers["keys"][:rows, :width].to(torch.int32) & 0xFFFF
    return (keys ^ torch.where(keys >= 0x8000, 0x8000, 0xFFFF)).to(torch.int16).view(dtype)


class Replay:
    """A draft model whose logits of each round are given."""

    def __init__(self, rounds: list[Tensor]) -> None:
        self._rounds, self._next = rounds, 0

    def next_state(self, state: Tensor, embedding: Tensor) -> Tensor:
        return state

    def features(self, context: Tensor, state: Tensor) -> Tensor:
        return state

    def project(self, _: Tensor) -> Tensor:
        self._next += 1
        return self._rounds[self._next - 1]


@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch(name: str) -> None:
    """Every round's logits are the drafter's for the beams so far, and the beams `beam_search`'s for these logits."""
    case = CASES[name]
    drafter, embedding, head = build(case)
    contexts, roots = inputs(case, case.batch)
    assert head.weight is not None
    width, beams, rounds = len(head.weight), roots.view(-1, 1, 1), []
    for length in range(1, case.shape.draft_len + 1):
        shape = DraftShape(case.shape.num_beams, length)
        assert SearchKernel.unsupported(drafter, embedding, head, shape) is None
        search = SearchKernel(drafter, embedding, head, shape, max_batch_size=case.batch)
        search._buffers["tokens"].fill_(-7)
        found, scores = (t.clone() for t in search(contexts, roots))
        again = search(contexts, roots)
        assert torch.equal(found, again[0]) and torch.equal(scores, again[1])
        logits = logits_of(search, case.batch * beams.shape[1], width, case.dtype).view(case.batch, -1, width)
        state = torch.zeros_like(contexts).unsqueeze(1).expand(-1, beams.shape[1], -1)
        for token in beams.unbind(-1):
            state = drafter.next_state(state, embedding[token])
        wanted = head.project(drafter.features(contexts.unsqueeze(1).expand_as(state), state)).double()
        assert (logits.double() - wanted).norm() <= 0.02 * wanted.norm()
        rounds.append(logits)
        replay: Any = Replay(rounds)
        given = DraftHead(replay.project, head.vocab_size, head.rows)
        *_, expected = search_rounds(replay, embedding, contexts, roots, shape, head=given)
        assert torch.equal(found, expected.tokens)
        assert torch.allclose(scores, expected.path_scores, rtol=1e-5, atol=1e-5)
        beams = found


def test_a_sequence_does_not_depend_on_its_company() -> None:
    case = CASES["typical"]
    drafter, embedding, head = build(case)
    search = SearchKernel(drafter, embedding, head, case.shape, max_batch_size=4)
    contexts, roots = inputs(case, 4)
    together = search(contexts, roots)[0].clone()
    for count in (1, 3):
        assert torch.equal(search(contexts[:count], roots[:count])[0], together[:count])


def test_lists_and_graphs_and_more_sequences_than_a_launch_takes() -> None:
    case = CASES["typical"]
    drafter, embedding, head = build(case)
    search = SearchKernel(drafter, embedding, head, case.shape, max_batch_size=2)
    contexts, roots = inputs(case, 5)
    expected = [search(contexts[i : i + 1], roots[i : i + 1])[0][0].tolist() for i in range(5)]
    assert search.search(list(contexts), roots.tolist()) == (expected, [True] * 5)
    graph, context, root = torch.cuda.CUDAGraph(), contexts[:1].clone(), roots[:1].clone()
    with torch.cuda.graph(graph):
        tokens, _ = search(context, root)
    context.copy_(contexts[3:4])
    root.copy_(roots[3:4])
    graph.replay()
    assert tokens[0].tolist() == expected[3]


def test_logits_that_are_not_numbers_do_no_harm() -> None:
    case = CASES["typical"]
    drafter, embedding, head = build(case)
    search = SearchKernel(drafter, embedding, head, case.shape, max_batch_size=2)
    contexts, roots = inputs(case, 2)
    contexts[0].fill_(torch.nan)
    tokens, _ = search(contexts, roots)
    assert tokens.min() >= 0 and tokens.max() < case.config.vocab_size
    alone = SearchKernel(drafter, embedding, head, case.shape, max_batch_size=2)
    assert torch.equal(alone(contexts.nan_to_num(), roots)[0][1], tokens[1])
