"""Rows, windows and masks, with literal tables."""

from __future__ import annotations

import torch

from trtllm_redrafter.training.rows import TrainingRows, WindowOrder, cut_windows


def two_texts() -> TrainingRows:
    """Texts of 3 and 2 tokens; hidden states are the row numbers."""
    return TrainingRows(
        torch.arange(5.0).unsqueeze(1), torch.tensor([10, 11, 12, 20, 21]), torch.tensor([0, 0, 0, 1, 1])
    )


def test_a_window_looks_ahead_but_never_into_another_text() -> None:
    batch = cut_windows(two_texts(), torch.tensor([0]), window=5, draft_len=2)
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 21, 21]]
    assert batch.valid.tolist() == [[[True, True, False, True, False], [True, False, False, False, False]]]


def test_rows_before_the_first_and_after_the_last_are_void() -> None:
    batch = cut_windows(two_texts(), torch.tensor([-2, 4]), window=3, draft_len=1)
    assert batch.valid.tolist() == [[[False, False, True]], [[False, False, False]]]


def test_every_row_comes_once_per_epoch() -> None:
    order = WindowOrder(total_rows=1003, window=16, batch=8, seed=5)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        starts = torch.cat([order.starts(step) for step in steps])[: order.windows_per_epoch]
        seen = (starts.unsqueeze(1) + torch.arange(16)).flatten()
        inside = seen[(seen >= 0) & (seen < 1003)]
        assert sorted(inside.tolist()) == list(range(1003))


def test_the_order_depends_on_seed_and_step_alone() -> None:
    first, again = (WindowOrder(500, 16, 4, seed=7) for _ in range(2))
    other = WindowOrder(500, 16, 4, seed=8)
    assert torch.equal(first.starts(11), again.starts(11))
    assert any(not torch.equal(first.starts(s), other.starts(s)) for s in range(3))
    assert not torch.equal(first.starts(0), first.starts(first.steps_per_epoch))


def test_fewer_rows_than_a_window() -> None:
    order = WindowOrder(total_rows=5, window=16, batch=4, seed=1)
    assert order.starts(0).shape == (4,)


def test_starts_of_texts() -> None:
    assert two_texts().starts == [0, 3]
    joined = TrainingRows.join([(torch.zeros(2, 4), torch.tensor([1, 2])), (torch.ones(1, 4), torch.tensor([3]))])
    assert joined.starts == [0, 2] and joined.tokens.tolist() == [1, 2, 3]
