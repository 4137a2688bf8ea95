"""Rotary position tables for the scalings this backend knows: none, `linear` and `llama3`.

Source of the llama3 rule: Meta's Llama 3.1 release. Wavelengths shorter than original_max / high_freq_factor keep
their frequency, those longer than original_max / low_freq_factor are slowed by `factor`, those between blend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.errors import BackendError

SUPPORTED_SCALINGS = ("default", "none", "linear", "llama3")


def scaling_kind(scaling: Mapping[str, Any] | None) -> str:
    """The scaling's name; both spellings of the key occur in the wild."""
    if not scaling:
        return "none"
    return str(scaling.get("rope_type") or scaling.get("type") or "none")


def inverse_frequencies(head_size: int, base: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """[head_size / 2] float32 radians per position.

    Raises `BackendError` for a scaling that this backend does not compute.
    """
    kind = scaling_kind(scaling)
    plain = 1.0 / (base ** (torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size))
    if kind in ("default", "none") or scaling is None:
        return plain
    if kind == "linear":
        return plain / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(plain, scaling)
    raise BackendError(
        f"rotary scaling {kind!r} is not known to the torch backend",
        remedy=f"use a model with one of: {', '.join(SUPPORTED_SCALINGS)}",
    )


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    mixed = (1 - blend) * plain / factor + blend * plain
    slowed = torch.where(wavelength > original / low, plain / factor, plain)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, mixed, slowed)


def rotary_tables(
    head_size: int, base: float, scaling: Mapping[str, Any] | None, positions: int
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [positions, head_size / 2] float32."""
    angles = torch.outer(torch.arange(positions).float(), inverse_frequencies(head_size, base, scaling))
    return angles.cos(), angles.sin()
