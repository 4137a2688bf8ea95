"""Filters against transformers' warpers, draws against the CDF they invert, uniforms against chance."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trtllm_redrafter.redrafter.sampling import (
    SamplingSettings,
    draw,
    filtered_logits,
    fresh_seed,
    greedy,
    uniform,
)


@dataclass(frozen=True)
class Row:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def warped_by_transformers(logits: Tensor, row: Row) -> Tensor:
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    ids = torch.zeros(1, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(row.temperature)(ids, logits.unsqueeze(0))
    if row.top_k > 0:
        scores = TopKLogitsWarper(row.top_k)(ids, scores)
    if row.top_p < 1.0:
        scores = TopPLogitsWarper(row.top_p)(ids, scores)
    result: Tensor = scores[0]
    return result


rows = st.builds(
    Row,
    temperature=st.floats(0.05, 3.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=1, max_size=5), st.sampled_from([5, 30, 1500, 9000]), st.integers(0, 10**6))
def test_filters_are_transformers(table: list[Row], vocab: int, seed: int) -> None:
    """The same tokens are kept with the same probabilities, whatever other rows are in the batch."""
    logits = torch.randn(len(table), vocab, generator=torch.Generator().manual_seed(seed)) * 2
    found = filtered_logits(logits, SamplingSettings.of(table)).softmax(1)
    for i, row in enumerate(table):
        expected = warped_by_transformers(logits[i], row).softmax(0)
        # a token whose cumulative mass equals top_p within rounding may fall on either side of the threshold
        assert int(((found[i] > 0) != (expected > 0)).sum()) <= 1
        torch.testing.assert_close(found[i], expected, atol=3e-3, rtol=1e-3)
        alone = filtered_logits(logits[i : i + 1], SamplingSettings.of([row])).softmax(1)
        assert torch.equal(alone[0], found[i])


def test_one_rows_top_k_does_not_narrow_anothers_top_p() -> None:
    logits = torch.zeros(2, 2000)
    logits[:, :3] = 0.1
    table = [Row(top_k=3, top_p=0.9), Row(top_p=0.9)]
    kept = (filtered_logits(logits, SamplingSettings.of(table)) > -torch.inf).sum(dim=1)
    assert kept.tolist() == [3, 2000]


def test_ties_at_the_threshold_are_all_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    kept = filtered_logits(logits, SamplingSettings.of([Row(top_k=2)])) > -torch.inf
    assert kept.tolist() == [[True, True, True, True, False]]
    kept = filtered_logits(logits, SamplingSettings.of([Row(top_p=0.5)])) > -torch.inf
    assert kept.tolist() == [[True, True, True, True, False]]


def test_greedy_takes_the_lowest_of_tied_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 5.0, 5.0]]).bfloat16()
    assert greedy(logits).tolist() == [1, 0]
    assert draw(logits, SamplingSettings.of([Row(temperature=0.0)] * 2), None).tolist() == [1, 0]


def test_greedy_and_sampled_rows_mix() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0]] * 2)
    table = [Row(temperature=0.0), Row(temperature=1.0)]
    assert draw(logits, SamplingSettings.of(table), torch.tensor([0.99, 0.99])).tolist() == [1, 2]


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.29, 1), (0.31, 2), (0.79, 2), (0.81, 4), (1 - 2**-24, 4)])
def test_draw_inverts_the_cdf(u: float, token: int) -> None:
    """Tokens without mass come out for no u, the ends included."""
    probs = torch.tensor([[0.0, 0.3, 0.5, 0.0, 0.2, 0.0]])
    assert draw(probs.log(), SamplingSettings.of([Row()]), torch.tensor([u])).tolist() == [token]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float) -> None:
    logits = torch.tensor([[300.0, 301.0, -1e4]])
    assert draw(logits, SamplingSettings.of([Row(temperature)]), torch.tensor([0.9])).tolist() == [1]


def test_a_sampled_row_without_a_number_is_our_mistake() -> None:
    with pytest.raises(TypeError, match="uniform"):
        draw(torch.zeros(1, 4), SamplingSettings.of([Row()]), None)


def test_draws_follow_the_distribution() -> None:
    """Total variation over 40,000 draws stays below its expectation (sqrt(V / 2 pi n)) by a wide bound."""
    n, probs = 40_000, torch.tensor([0.02, 0.08, 0.4, 0.2, 0.3])
    tokens = draw(probs.log().expand(n, -1), SamplingSettings.of([Row()] * n), uniform(7, range(n)))
    distance = 0.5 * (tokens.bincount(minlength=5) / n - probs).abs().sum()
    assert distance < 3 * (5 / (2 * torch.pi * n)) ** 0.5


def test_uniforms_are_fixed_for_ever() -> None:
    """A change here changes every seeded text; these values are the promise."""
    assert uniform(0, [0, 1, 2]).tolist() == [0.6524484753608704, 0.7012121081352234, 0.38712412118911743]
    assert uniform([[0], [1]], [[0, 1]]).shape == (2, 2)
    assert uniform([5, 6], 3).tolist() == [uniform(5, 3).item(), uniform(6, 3).item()]


def test_uniforms_look_uniform_along_positions_and_seeds() -> None:
    n = 1 << 16
    for numbers in (uniform(123, range(n)), uniform(range(n), 5), uniform(2**63 - 1, range(n))):
        assert numbers.dtype == torch.float32 and numbers.min() >= 0.0 and numbers.max() < 1.0
        counts = torch.histc(numbers, 256, 0.0, 1.0)
        chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert 255 - 5 * (2 * 255) ** 0.5 < chi_square < 255 + 5 * (2 * 255) ** 0.5
        neighbours = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
        assert neighbours.abs() < 5 / n**0.5


def test_fresh_seeds_differ_and_fit() -> None:
    seeds = {fresh_seed() for _ in range(100)}
    assert len(seeds) == 100 and all(0 <= seed < 2**63 for seed in seeds)
