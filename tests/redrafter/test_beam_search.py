"""Beam search: by hand on small tables, and against a slow, obvious implementation over the full vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.redrafter.toy import random_drafter
from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.redrafter.beam_search import DraftHead, _largest_of_chunks, beam_search, draft_head
from trtllm_redrafter.redrafter.config import CUT, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter


class Markov:
    """A drafter that depends on the last token only: the state is that token, and the features are the state."""

    def __init__(self, table: list[list[float]]) -> None:
        self.table = torch.tensor(table).log()

    def next_state(self, state: Tensor, embedding: Tensor) -> Tensor:
        return embedding

    def features(self, context: Tensor, state: Tensor) -> Tensor:
        return state

    def head(self) -> DraftHead:
        return DraftHead(lambda state: self.table[state[..., 0].long()], self.table.shape[1])


def embed(tokens: Tensor) -> Tensor:
    return tokens.float().unsqueeze(-1)


def search(model: Markov, first: int, beams: int, length: int) -> list[list[int]]:
    found = beam_search(
        model, embed, torch.zeros(1, 1), torch.tensor([first]), DraftShape(beams, length), head=model.head()
    )
    tokens: list[list[int]] = found.tokens[0].tolist()
    return tokens


def test_likeliest_paths_by_eye() -> None:
    #        to  0    1    2         after 0: 0→1 .5·.6 = .30   0→2 .4·.9 = .36   0→1→0 .5·.3 = .15
    model = Markov([[0.1, 0.5, 0.4], [0.3, 0.1, 0.6], [0.9, 0.05, 0.05]])
    assert search(model, 0, 1, 2) == [[0, 1, 2]]
    assert search(model, 0, 2, 2) == [[0, 2, 0], [0, 1, 2]]
    assert search(model, 0, 3, 2) == [[0, 2, 0], [0, 1, 2], [0, 1, 0]]


def test_equal_scores_go_to_the_lowest_beam_then_the_lowest_token() -> None:
    model = Markov([[0.25] * 4] * 4)
    assert search(model, 3, 3, 1) == [[3, 0], [3, 1], [3, 2]]
    assert search(model, 3, 3, 2) == [[3, 0, 0], [3, 0, 1], [3, 0, 2]]


def test_more_beams_than_tokens_repeat_a_dead_beam() -> None:
    """Round one has two tokens for four beams; the other beams score far below everything else."""
    model = Markov([[0.6, 0.4], [0.5, 0.5]])
    found = beam_search(model, embed, torch.zeros(1, 1), torch.tensor([0]), DraftShape(4, 1), head=model.head())
    assert found.tokens[0].tolist() == [[0, 0], [0, 1], [0, 0], [0, 0]]
    assert (found.scores[0, 2:] < CUT + 1).all()


def plain_search(drafter: Drafter, embedding: Tensor, context: Tensor, first: int, shape: DraftShape) -> Tensor:
    """One sequence, full vocabulary, a Python list of beams: slow and obvious. Returns [K, L+1]."""
    beams = [(0.0 if b == 0 else CUT, [first], torch.zeros_like(context)) for b in range(shape.num_beams)]
    for _ in range(shape.draft_len):
        options = []
        for b, (score, tokens, state) in enumerate(beams):
            state = drafter.next_state(state, embedding[tokens[-1]])
            z = drafter.logits(context, state)
            z = z - z.max()
            if len(z) > 50:
                z[z < z.sort(descending=True).values[49]] = CUT
            total = score + z.log_softmax(0)
            options += [(-float(v), b * len(z) + t, tokens, t, state) for t, v in enumerate(total)]
        options.sort(key=lambda option: option[:2])
        beams = [(-o[0], [*o[2], o[3]], o[4]) for o in options[: shape.num_beams]]
    return torch.tensor([tokens for _, tokens, _ in beams])


@settings(max_examples=25, deadline=None)
@given(
    vocab=st.sampled_from([3, 40, 50, 51, 60, 90, 200]),
    beams=st.integers(1, 6),
    length=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    rnn=st.booleans(),
)
@torch.no_grad()
def test_equals_the_plain_search(vocab: int, beams: int, length: int, seed: int, rnn: bool) -> None:
    drafter = random_drafter(vocab, seed=seed, rnn=rnn)
    drafter, embedding, contexts = drafter.double(), torch.randn(vocab, 8).double(), torch.randn(3, 8).double()
    shape = DraftShape(beams, length)
    firsts = torch.randint(vocab, (3,))
    found = beam_search(drafter, embedding, contexts, firsts, shape, score_dtype=None)
    for row in range(3):
        expected = plain_search(drafter, embedding, contexts[row], int(firsts[row]), shape)
        assert found.tokens[row].tolist() == expected.tolist()


@pytest.mark.parametrize("tied", [0, 5, 20, 100])
def test_all_tokens_that_tie_with_the_fiftieth_stay(tied: int) -> None:
    logits = (torch.arange(49, 0, -1.0) / 64).tolist() + [0.0] * (1 + tied) + [-1.0] * 100
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    row = torch.tensor(logits)[order]
    head = DraftHead(lambda state: row.expand(*state.shape[:-1], -1), len(logits))
    found = beam_search(
        Markov([[1.0]]), embed, torch.zeros(1, 1), torch.tensor([0]), DraftShape(50, 1), head=head, keep_log_probs=True
    )
    assert found.log_probs is not None
    log_probs = found.log_probs[0, 0, 0]
    kept = row >= 0.0
    torch.testing.assert_close(log_probs[kept], row[kept].log_softmax(0))
    assert (log_probs[~kept] < CUT / 2).all() and int(kept.sum()) == 50 + tied
    last = found.tokens[0, 49, 1]  # of the tied, the lowest id is drafted
    assert int(last) == int((row == 0.0).nonzero()[0])


def test_path_scores_sum_the_log_probs_they_were_taken_from() -> None:
    drafter = random_drafter(70, seed=3)
    found = beam_search(
        drafter, torch.randn(70, 8), torch.randn(2, 8), torch.tensor([1, 2]), DraftShape(4, 3), keep_log_probs=True
    )
    assert found.log_probs is not None
    taken = found.log_probs.gather(-1, found.tokens[..., 1:, None]).squeeze(-1)
    torch.testing.assert_close(found.path_scores[..., 1:], taken.cumsum(-1))
    assert (found.path_scores.diff(dim=-1) <= 0).all()
    assert (found.scores.diff(dim=1) <= 0).all()


def test_a_head_on_some_rows_drafts_those_tokens_only() -> None:
    drafter, embedding, context = random_drafter(90, seed=5), torch.randn(90, 8), torch.randn(2, 8)
    first, shape = torch.tensor([7, 8]), DraftShape(3, 3)
    rows = torch.arange(89, 9, -1)
    found = beam_search(drafter, embedding, context, first, shape, head=draft_head(drafter, rows), keep_log_probs=True)
    assert (found.tokens[..., 1:] >= 10).all()
    assert found.log_probs is not None and found.log_probs.shape[-1] == 90
    assert (found.log_probs[..., :10] < CUT / 2).all()
    everything = beam_search(drafter, embedding, context, first, shape, head=draft_head(drafter, torch.arange(90)))
    assert torch.equal(everything.tokens, beam_search(drafter, embedding, context, first, shape).tokens)


def test_bfloat16_scores_are_float32_unless_asked() -> None:
    drafter, embedding = random_drafter(90, seed=6).bfloat16(), torch.randn(90, 8).bfloat16()
    context, first = torch.randn(1, 8).bfloat16(), torch.tensor([3])
    assert beam_search(drafter, embedding, context, first, DraftShape(4, 3)).scores.dtype == torch.float32
    mirrored = beam_search(drafter, embedding, context, first, DraftShape(4, 3), score_dtype=None)
    assert mirrored.scores.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (DraftShape(51, 3), "num_beams is 51, more than 50"),
        (DraftShape(0, 3), "num_beams is 0"),
        (DraftShape(4, 0), "draft_len is 0"),
        (DraftShape(51, 0), "cannot draft 51 beams of 0 tokens"),
    ],
)
def test_shapes_that_cannot_be_drafted(shape: DraftShape, text: str) -> None:
    drafter = random_drafter(90)
    with pytest.raises(UsageError, match=text) as caught:
        beam_search(drafter, torch.randn(90, 8), torch.zeros(1, 8), torch.tensor([0]), shape)
    assert "remedy" in str(caught.value)


@pytest.mark.parametrize(("width", "count"), [(8192, 64), (8193, 64), (10_000, 512), (151_936, 256)])
def test_the_largest_are_found_in_chunks_too(width: int, count: int) -> None:
    """What a GPU does: the same values; where they do not tie, the same columns."""
    logits = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    values, columns = _largest_of_chunks(logits, count)
    assert torch.equal(values, logits.topk(count).values) and torch.equal(values, logits.gather(-1, columns))
    assert columns.max() < width and all(len(set(row.tolist())) == count for row in columns.flatten(0, 1))


@pytest.mark.parametrize(("tied", "missed"), [(0, False), (13, False), (14, True), (200, True)])
def test_missed_ties_are_recorded(tied: int, missed: bool) -> None:
    """64 candidates are read; the 50th may tie with 14 more, and one of those could be the 65th."""
    row = torch.tensor((torch.arange(49, 0, -1.0) / 64).tolist() + [0.0] * (1 + tied) + [-1.0] * 300)
    head = DraftHead(lambda state: row.expand(*state.shape[:-1], -1), len(row))
    recorded: list[torch.Tensor] = []
    found = beam_search(
        Markov([[1.0]]), embed, torch.zeros(1, 1), torch.tensor([0]), DraftShape(4, 2), head=head, missed_ties=recorded
    )
    assert [bool(flag) for flag in recorded] == [missed, missed] and found.tokens.shape == (1, 4, 3)
