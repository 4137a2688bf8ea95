"""The chunked loss equals the obvious one that keeps every logit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.training.loss import LossOptions, distillation_loss

W, S, L, H, D, V = 3, 4, 2, 6, 5, 11


def options(**changes: object) -> LossOptions:
    fields: dict[str, object] = {
        "kd_weight": 0.7,
        "ce_weight": 0.3,
        "kd_temperature": 0.8,
        "position_weights": (1.0, 0.5),
        "chunk_windows": 2,
        "compile": False,
    }
    return LossOptions(**(fields | changes))  # type: ignore[arg-type]


def batch(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "features": torch.randn(W, L, S, D, dtype=torch.float64, requires_grad=True),
        "head": torch.randn(V, D, dtype=torch.float64, requires_grad=True),
        "hidden": torch.randn(W, S + L, H, dtype=torch.float64),
        "teacher_head": torch.randn(V, H, dtype=torch.float64),
        "tokens": torch.randint(V, (W, S + L)),
        "valid": torch.rand(W, L, S) < 0.7,
    }


def plain(data: dict[str, Tensor], o: LossOptions) -> Tensor:
    """Mean over valid rows per position, then the weighted mean of positions."""
    total = torch.zeros((), dtype=torch.float64)
    for j in range(L):
        logits = data["features"][:, j] @ data["head"].T
        teacher = data["hidden"][:, j + 1 : j + 1 + S] @ data["teacher_head"].T
        soft = -(torch.softmax(teacher / o.kd_temperature, -1) * torch.log_softmax(logits, -1)).sum(-1)
        hard = F.cross_entropy(logits.flatten(0, 1), data["tokens"][:, j + 1 : j + 1 + S].flatten(), reduction="none")
        rows = (o.kd_weight * soft + o.ce_weight * hard.view(W, S))[data["valid"][:, j]]
        total = total + o.position_weights[j] / sum(o.position_weights) * rows.mean()
    return total


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@pytest.mark.parametrize("kd, ce", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
def test_loss_and_gradients_equal_the_plain_reference(chunk: int, kd: float, ce: float) -> None:
    o = options(chunk_windows=chunk, kd_weight=kd, ce_weight=ce)
    ours, reference = batch(), batch()
    found = distillation_loss(**ours, options=o)
    found.total.backward()  # type: ignore[no-untyped-call]
    expected = plain(reference, o)
    expected.backward()  # type: ignore[no-untyped-call]
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name in ("features", "head"):
        torch.testing.assert_close(ours[name].grad, reference[name].grad, rtol=1e-4, atol=1e-6)


def test_rows_that_are_not_valid_weigh_nothing() -> None:
    data = batch()
    before = distillation_loss(**data, options=options()).total
    changed = data | {"features": data["features"].detach().masked_fill(~data["valid"].unsqueeze(-1), 99.0)}
    after = distillation_loss(**changed, options=options()).total
    assert before.item() == after.item()


def test_a_batch_without_a_single_target_is_zero_not_nan() -> None:
    data = batch() | {"valid": torch.zeros(W, L, S, dtype=torch.bool)}
    found = distillation_loss(**data, options=options())
    found.total.backward()  # type: ignore[no-untyped-call]
    assert found.total.item() == 0.0
    assert data["features"].grad is not None and not data["features"].grad.any()
