"""What only the tensorrt backend takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CompilerOptions:
    """`gpu` is a row of `planning.gpus`; `compiler` one of `compilers.COMPILERS`, or "auto"."""

    gpu: str
    compiler: str
    weights: str = "inputs"
    """`inputs`: they stay in the checkpoint; `inside`: each plan holds them."""
