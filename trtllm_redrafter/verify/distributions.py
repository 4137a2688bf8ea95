"""Are an engine's distributions those of an exact computation, within its dtype's rounding?

Greedy tokens hide most faults: a final norm that is 5 % too large changes none of them. So whole distributions are
compared, position by position, in a unit measured at the same positions: the difference d between the engine's logits
and exact ones, over the difference r that rounding makes (`reference`). Adding a constant to logits changes no
distribution, so both are centred. Five figures are checked, each about 1 on an intact engine:

    typical    median over positions of RMS(d), over that of RMS(r): a fault everywhere
    often      90th percentile of the same: a fault at many positions
    worst      largest over positions of RMS(d) / RMS(r): a fault at some tokens or positions
    largest    largest single |d| in units of RMS(r): a fault of single tokens, such as a row of the head
    scale      how much of d is the exact logits times a factor: a wrong temperature, whatever the noise

    check = check_distributions(rows, "bfloat16")    # rows per text: (engine's, exact, rounded, perturbed), [n, V]
    check.render(), list(check.problems(engine))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.errors import Problem
from trtllm_redrafter.verify.reference import UNIT_ROUNDOFF

TYPICAL, OFTEN, WORST, LARGEST, SCALE = 1.5, 1.5, 3.5, 2.0, 2.0
"""Limits; docs/verification.md shows the intact engines they are based on, and which faults pass."""

USUAL_LARGEST = 6.0
"""Lower bound, in RMS, of the largest rounding error that `largest` is relative to."""

REMEDY = "do not serve this engine; build it again, and compare its weights with `verify --against`"


@dataclass(frozen=True)
class DistributionCheck:
    """The figures of the module's docstring; `largest` is relative to rounding's. KL divergences: means, in nats."""

    dtype: str
    positions: int
    not_finite: int
    """Positions at which some logit of the engine is NaN or infinite; the other figures leave them out."""
    typical: float
    often: float
    worst: float
    largest: float
    scale: float
    kl: float
    kl_rounding: float

    def figures(self) -> dict[str, tuple[float, float]]:
        """Name -> (found, allowed)."""
        return {
            "typical": (self.typical, TYPICAL),
            "often": (self.often, OFTEN),
            "worst": (self.worst, WORST),
            "largest": (self.largest, LARGEST),
            "scale": (abs(self.scale), SCALE),
        }

    def exceeded(self) -> list[str]:
        return [name for name, (found, allowed) in self.figures().items() if not found <= allowed]

    def render(self) -> str:
        """Two lines for the report."""
        figures = ", ".join(f"{name} {found:.2f} ({allowed:g})" for name, (found, allowed) in self.figures().items())
        return (
            f"  logits      {self.positions} positions, over what {self.dtype} rounds there (allowed): {figures}\n"
            f"              KL divergence from exact {self.kl:.2g} nats, rounding alone {self.kl_rounding:.2g}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "exceeded": self.exceeded()}

    def problems(self, where: Path) -> Iterator[Problem]:
        if self.not_finite:
            what = f"logits are not finite at {self.not_finite} of {self.positions} positions"
            yield Problem(what, str(where), None, "look for weights that are not finite; convert with bfloat16")
        exceeded = self.exceeded()
        if exceeded:
            figures = self.figures()
            found = ", ".join(f"{name} {figures[name][0]:.2f}, {figures[name][1]:g} is allowed" for name in exceeded)
            what = "the logits are further from exact than rounding explains"
            yield Problem(what, str(where), f"in units of what {self.dtype} rounds: {found}", REMEDY)


@torch.no_grad()
def check_distributions(
    rows: Iterable[tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]], dtype: str
) -> DistributionCheck:
    """`rows` per text: the engine's logits, exact ones, those computed in the dtype itself, and perturbed ones.

    All [n, V]; `reference.ReferenceLogits.rows` has all but the first.
    """
    texts = [_Text.of(found.to(exact), exact, rounded, perturbed) for found, exact, rounded, perturbed in rows]
    found = _Rows.joined([text.found for text in texts])
    rounded = _Rows.joined([text.rounded for text in texts])
    perturbed = [_Rows.joined(list(each)) for each in zip(*(text.perturbed for text in texts), strict=True)]
    exact_rms = torch.cat([text.exact_rms for text in texts])
    finite = found.rms.isfinite() & found.largest.isfinite()
    count, lost = len(finite), int((~finite).sum())
    if lost == count:
        return DistributionCheck(dtype, count, lost, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    unit = rounding_unit(rounded.rms, [each.rms for each in perturbed], UNIT_ROUNDOFF[dtype] / 4 * exact_rms)
    usual = float((rounded.largest / unit).max().clamp_min(USUAL_LARGEST))
    slope = rounded.slope.abs().clamp_min(UNIT_ROUNDOFF[dtype] / 16).median()
    kept = _Rows(*(part[finite] for part in found.parts()))
    return DistributionCheck(
        dtype=dtype, positions=count, not_finite=lost,
        typical=float(kept.rms.median() / rounded.rms.median().clamp_min(float(unit.min()))),
        often=float((kept.rms / unit[finite]).quantile(0.9) / (rounded.rms / unit).quantile(0.9).clamp_min(0.5)),
        worst=float((kept.rms / unit[finite]).max()),
        largest=float((kept.largest / unit[finite]).max()) / usual,
        scale=float(kept.slope.median() / slope),
        kl=float(kept.kl.mean()), kl_rounding=float(rounded.kl.mean()),
    )  # fmt: skip


def rounding_unit(rounded: Tensor, perturbed: Sequence[Tensor], floor: Tensor) -> Tensor:
    """Rounding error at each of [n] positions: RMS over the ways of rounding, at least the median over positions.

    Perturbations are scaled to the size of real rounding first: they show where rounding matters, not how much.
    """
    typical = rounded.median()
    scaled = [each * (typical / each.median().clamp_min(1e-30)) for each in perturbed]
    unit = torch.stack([rounded, *scaled]).pow(2).mean(dim=0).sqrt()
    return torch.maximum(unit.clamp_min(float(unit.median())), floor)


@dataclass(frozen=True)
class _Rows:
    """How far some logits are from exact ones: one number per position, [n] each."""

    rms: Tensor
    largest: Tensor
    slope: Tensor
    kl: Tensor

    def parts(self) -> tuple[Tensor, ...]:
        return self.rms, self.largest, self.slope, self.kl

    @classmethod
    def joined(cls, texts: Sequence[_Rows]) -> _Rows:
        return cls(*(torch.cat(part) for part in zip(*(text.parts() for text in texts), strict=True)))


@dataclass(frozen=True)
class _Text:
    exact_rms: Tensor
    found: _Rows
    rounded: _Rows
    perturbed: tuple[_Rows, ...]

    @classmethod
    def of(cls, found: Tensor, exact: Tensor, rounded: Tensor, perturbed: Sequence[Tensor]) -> _Text:
        centred = exact - exact.mean(dim=-1, keepdim=True)
        power = centred.pow(2).sum(dim=-1)
        logs = exact.log_softmax(dim=-1)

        def compared(logits: Tensor) -> _Rows:
            difference = logits - logits.mean(dim=-1, keepdim=True) - centred
            rms = difference.pow(2).mean(dim=-1).sqrt()
            slope = (difference * centred).sum(dim=-1) / power
            kl = (logs.exp() * (logs - logits.log_softmax(dim=-1))).sum(dim=-1)
            return _Rows(rms, difference.abs().amax(dim=-1), slope, kl)

        rms = (power / exact.shape[-1]).sqrt()
        return cls(rms, compared(found), compared(rounded.to(exact)), tuple(map(compared, perturbed)))
