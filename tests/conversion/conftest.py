"""Options with everything filled in, and a conversion in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.progress import no_progress

Options = Callable[..., ConvertOptions]
Convert = Callable[..., Checkpoint]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    def make(base: Path, drafter: Path | None = None, **changes: Any) -> ConvertOptions:
        values: dict[str, Any] = {
            "output": tmp_path / "out",
            "dtype": "auto",
            "tp_size": 1,
            "num_beams": None,
            "draft_len": None,
            "greedy": True,
            "parallel_embedding": False,
            "workers": 2,
            "overwrite": False,
        }
        return ConvertOptions(base=base, drafter=drafter, **(values | changes))

    return make


@pytest.fixture
def run(options: Options) -> Convert:
    """Convert and open the result."""

    def convert_and_open(base: Path, drafter: Path | None = None, **changes: Any) -> Checkpoint:
        return Checkpoint.open(convert(plan_conversion(options(base, drafter, **changes)), no_progress))

    return convert_and_open
