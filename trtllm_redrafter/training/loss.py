"""Distillation and cross-entropy over the whole vocabulary, without ever holding [S, L, V].

A row of a text is one base-model hidden state, which predicts the token at the same row. The drafter, standing at
row i, predicts the token at row i + j from position j; its teacher is the base model at row i + j. So the teacher's
logits of a chunk are computed once and serve all L positions, and the gradient is formed beside the loss, chunk
by chunk, while the logits are still there (they are never kept for a backward pass):

    target  = kd_weight * softmax(teacher / temperature) + ce_weight * onehot(token)
    loss    = -sum(target * log_softmax(student))
    d loss  = (kd_weight + ce_weight) * softmax(student) - target
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LossOptions:
    """What is learnt and how much of it.

    `kd_temperature` below 1 sharpens the teacher: less of its tail, more of the token greedy decoding takes.
    `position_weights` has one entry per future position. `chunk_windows` bounds memory: that many windows' logits
    exist at a time.
    """

    kd_weight: float
    ce_weight: float
    kd_temperature: float
    position_weights: tuple[float, ...]
    chunk_windows: int
    compile: bool


def row_terms(
    student: Tensor, teacher: Tensor, teacher_lse: Tensor, token: Tensor, kd: float, ce: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss of each row and its gradient with respect to the student's logits. [..., V] -> [...], [..., V]."""
    z = student.float()
    lse = torch.logsumexp(z, dim=-1, keepdim=True)
    p = torch.exp(teacher.float() / temperature - teacher_lse.unsqueeze(-1))
    hit = torch.arange(z.shape[-1], device=z.device) == token.unsqueeze(-1)
    target = kd * p + ce * hit
    loss = (kd + ce) * lse.squeeze(-1) - (target * z).sum(dim=-1)
    gradient = (kd + ce) * torch.exp(z - lse) - target
    return loss, gradient.to(student.dtype)


def scaled_lse(teacher: Tensor, temperature: float) -> Tensor:
    """log sum exp(teacher / temperature), [..., V] -> [...]."""
    return torch.logsumexp(teacher.float() / temperature, dim=-1)


@cache
def _kernels(fused: bool) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    if not fused:
        return row_terms, scaled_lse
    return torch.compile(row_terms, dynamic=False), torch.compile(scaled_lse, dynamic=False)


class _Distillation(torch.autograd.Function):
    """The weighted sum of all rows' losses; backward only scales gradients that forward already formed."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        head: Tensor,
        hidden: Tensor,
        teacher_head: Tensor,
        tokens: Tensor,
        weights: Tensor,
        options: LossOptions,
    ) -> tuple[Tensor, Tensor]:
        terms, lse_of = _kernels(options.compile)
        windows, length, rows, _ = features.shape
        dtype = features.dtype
        head_rows = head.detach().to(dtype)
        feature_grad = torch.empty_like(features)
        head_grad = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        sums = features.new_zeros(length, dtype=torch.float32)
        for start in range(0, windows, options.chunk_windows):
            part = slice(start, start + options.chunk_windows)
            teacher = F.linear(hidden[part], teacher_head)
            lse = lse_of(teacher, options.kd_temperature)
            for j in range(length):
                ahead = slice(j + 1, j + 1 + rows)
                x, weight = features[part, j], weights[part, j]  # [w, S, D], [w, S]
                loss, gradient = terms(
                    F.linear(x, head_rows),
                    teacher[:, ahead],
                    lse[:, ahead],
                    tokens[part, ahead],
                    options.kd_weight,
                    options.ce_weight,
                    options.kd_temperature,
                )
                sums[j] += (loss * weight).sum()
                # The weight goes in after the product: gradient entries stay of order one in bfloat16.
                feature_grad[part, j] = (gradient @ head_rows * weight.unsqueeze(-1)).to(dtype)
                if head_grad is not None:
                    weighted = x * weight.unsqueeze(-1).to(dtype)
                    head_grad += gradient.flatten(0, 1).T @ weighted.flatten(0, 1)
        ctx.save_for_backward(feature_grad, head_grad)
        ctx.mark_non_differentiable(sums)
        return sums.sum(), sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:
        feature_grad, head_grad = ctx.saved_tensors
        scaled_head = None if head_grad is None else head_grad * grad
        return feature_grad * grad.to(feature_grad.dtype), scaled_head, None, None, None, None, None


@dataclass
class LossResult:
    total: Tensor
    """Scalar; call `.backward()` on it."""
    per_position: Tensor
    """[L], detached: mean loss of each position over its valid rows (no position weights)."""


def count_targets(valid: Tensor) -> Tensor:
    """Targets of each position. [W, L, S] -> [L]."""
    return valid.sum(dim=(0, 2)).float()


def distillation_loss(
    features: Tensor,
    head: Tensor,
    hidden: Tensor,
    teacher_head: Tensor,
    tokens: Tensor,
    valid: Tensor,
    options: LossOptions,
    counts: Tensor | None = None,
) -> LossResult:
    """Mean loss over a batch of windows.

    features [W, L, S, D], head [V, D]; hidden [W, S + L, H], teacher_head [V, H]; tokens [W, S + L];
    valid [W, L, S] bool: does row i + j exist in row i's text? Position j of row i is scored against row i + j.
    `counts` [L] are the targets to divide by when these windows are part of a larger batch: the parts then add up.
    """
    counts = (count_targets(valid) if counts is None else counts).clamp(min=1)
    importance = torch.tensor(options.position_weights, device=features.device)
    importance = importance / importance.sum()
    weights = valid.float() * (importance / counts).view(1, -1, 1)
    # Weights of order one inside, the mean outside: small numbers would be lost in bfloat16 gradients.
    scale = float(valid.shape[0] * valid.shape[2])
    apply: Any = _Distillation.apply
    total, sums = apply(features, head, hidden, teacher_head, tokens, weights * scale, options)
    per_position = sums / scale / importance.clamp(min=1e-12)
    return LossResult(total / scale, per_position)
