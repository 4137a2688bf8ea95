"""Settings of `bench` and `tune`, with their defaults."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from trtllm_redrafter.settings.base import Directory, Positive, Section, Text
from trtllm_redrafter.settings.training import DEFAULT_GRID, Grid

Share = Annotated[float, Field(gt=0.0, lt=1.0)]


def parse_batches(text: str) -> tuple[int, ...]:
    """ "1,4,16" → (1, 4, 16)."""
    return tuple(int(part) for part in text.split(","))


def _batches(text: str) -> str:
    try:
        good = min(parse_batches(text)) >= 1
    except ValueError:
        good = False
    if not good:
        raise ValueError("it should be batch sizes such as 1,4,16")
    return text


Batches = Annotated[str, AfterValidator(_batches)]


class BenchSection(Section):
    """engine → does drafting pay."""

    prompts: Directory | None = Field(
        default=None, description="JSONL file of prompts, or Spec-Bench's questions; derived: the built-in eighty"
    )
    batch: Batches = Field(default="1,4", description="batch sizes, as 1,4,16")
    max_tokens: Positive = Field(default=128, description="tokens to write per prompt")
    repeats: Annotated[int, Field(ge=3)] = Field(default=3, description="times each prompt is measured, at least 3")
    limit: Positive | None = Field(default=None, description="prompts taken, evenly over the file; derived: all")
    warmup: Positive = Field(default=2, description="rounds per batch size and side before the first that counts")
    report: Directory | None = Field(default=None, description="directory for the HTML, Markdown and JSON report")
    confidence: Share = Field(default=0.95, description="level of the intervals")
    resamples: Annotated[int, Field(ge=100)] = Field(default=2000, description="draws of the bootstrap")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the bootstrap")
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.02, description="share of speed that `bench compare` lets go without a flag"
    )


class TuneSection(Section):
    """recipe → which draft shape."""

    target: Text = Field(default="this", description="this machine, or a GPU of the table such as h100-80gb")
    prompts: Directory | None = Field(default=None, description="JSONL file of prompts; derived: the built-in eighty")
    grid: Grid = Field(default=DEFAULT_GRID, description="settings BEAMSxLENGTH; derived: those the drafter can do")
    batch: Batches = Field(default="1,4", description="batch sizes, as 1,4,16")
    max_tokens: Positive = Field(default=128, description="tokens the base model writes per prompt")
    limit: Positive | None = Field(default=None, description="prompts taken, evenly over the file; derived: all")
    budget: Annotated[int, Field(ge=0)] = Field(default=0, description="best settings to measure after predicting")
    steps: Positive = Field(default=40, description="decoding steps timed per setting and batch size")
    report: Directory | None = Field(default=None, description="directory for the report")
