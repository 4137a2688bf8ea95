"""The trained form is Apple's function, whatever the head and whatever the scales."""

from __future__ import annotations

import pytest
import torch

from trtllm_redrafter.errors import UsageError
from trtllm_redrafter.redrafter.config import DrafterConfig
from trtllm_redrafter.training.drafter_files import export_weights, load_weights, weight_names
from trtllm_redrafter.training.model import DrafterSpec, HeadKind, InputScales, TrainableDrafter

H, V, L = 8, 20, 3
FORMS = [(HeadKind.FACTOR, 16), (HeadKind.FACTOR, 12), (HeadKind.TIED, 8), (HeadKind.FULL, 8), (HeadKind.FULL, 16)]


def spec(head: HeadKind, exit_dim: int, rnn: bool = True) -> DrafterSpec:
    return DrafterSpec(DrafterConfig(V, H, exit_dim, 2, rnn), head, L)


def drafter(head: HeadKind, exit_dim: int, *, rnn: bool = True, scaled: bool = True) -> TrainableDrafter:
    torch.manual_seed(3)
    scales = InputScales(torch.rand(H) * 5 + 0.1, torch.rand(H) + 0.01) if scaled else None
    model = TrainableDrafter(spec(head, exit_dim, rnn), seed=1, scales=scales)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("head, exit_dim", FORMS)
def test_exported_weights_compute_what_was_trained(head: HeadKind, exit_dim: int) -> None:
    trained = drafter(head, exit_dim)
    shipped = load_weights(trained.spec, export_weights(trained, torch.float32))
    context, following = torch.randn(2, 5, H), torch.randn(2, 5 + L, H)
    torch.testing.assert_close(trained(context, following), shipped(context, following))


@pytest.mark.parametrize("rnn", [True, False])
def test_positions_are_what_a_beam_search_would_feed(rnn: bool) -> None:
    model = drafter(HeadKind.FACTOR, 16, rnn=rnn)
    context, following = torch.randn(1, 4, H), torch.randn(1, 4 + L, H)
    together = model(context, following)
    for row in range(4):
        state = torch.zeros(H)
        for j in range(L):
            state = model.core.next_state(state, following[0, row + j])
            torch.testing.assert_close(together[0, j, row], model.project(context[0, row], state))


@pytest.mark.parametrize("head, exit_dim", FORMS)
def test_names_are_apples(head: HeadKind, exit_dim: int) -> None:
    names = set(weight_names(spec(head, exit_dim)))
    expected = {f"lm_head.{i}.linear.{p}" for i in (0, 1) for p in ("weight", "bias")}
    expected |= {"rnn_u.weight", "rnn_u.bias", "rnn_w.weight"}
    expected |= {"input_proj.weight", "input_proj.bias"} if exit_dim != 2 * H else set()
    expected |= {"lm_head.2.weight"} if head is HeadKind.FULL else set()
    expected |= {"lm_head_factor.weight"} if head is HeadKind.FACTOR else set()
    assert names == expected


def test_a_full_head_of_the_right_width_starts_from_the_base() -> None:
    base_head = torch.randn(V, H)
    model = TrainableDrafter(spec(HeadKind.FULL, H), seed=1, base_head=base_head)
    assert torch.equal(model.head_of(base_head), base_head)


def test_a_tied_head_needs_the_hidden_size() -> None:
    with pytest.raises(UsageError, match="a tied head needs exit_dim 8, not 16"):
        TrainableDrafter(spec(HeadKind.TIED, 16), seed=1)


def test_the_same_seed_gives_the_same_drafter() -> None:
    first, again = (TrainableDrafter(spec(HeadKind.FACTOR, 16), seed=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
