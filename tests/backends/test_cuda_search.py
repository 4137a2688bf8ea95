"""The search kernel's plan: what needs no GPU. What it computes is tested in tests/gpu/test_cuda_search.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from trtllm_redrafter.backends.torch.cuda.search_plan import SearchPlan
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape

BASE = SearchPlan(DrafterConfig(151936, 1536, 768, 2), DraftShape(5, 5), 1, 32768, 768, 132, half=False)


def test_boxes_cover_every_row_and_column_and_fit_a_slot() -> None:
    for hidden, exit_dim, blocks in product((64, 1536, 4096, 5120), (128, 768, 1024, 8192), (114, 132)):
        config = replace(BASE.config, hidden_size=hidden, exit_dim=exit_dim)
        plan = replace(BASE, config=config, head_columns=exit_dim, blocks=blocks)
        sizes = {"STATE": (hidden, hidden), "INPUT": (exit_dim, hidden), "EXIT": (exit_dim, exit_dim)}
        for name, (rows, columns) in sizes.items():
            cut = plan.cuts[name]
            assert cut.rows * blocks >= rows
            assert cut.height <= 16
            assert cut.height * cut.depth * 128 <= plan.slot
            assert 1 <= cut.depth <= columns // 64


def test_shared_memory_suffices_for_batches_that_are_supported() -> None:
    batches = [batch for batch in range(1, 40) if replace(BASE, batch=batch).unsupported() is None]
    assert batches[0] == 1 and batches[-1] >= 16
    for batch in batches:
        assert replace(BASE, batch=batch).shared_bytes <= 227 << 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_rows": 49}, "49 head rows"),
        ({"head_columns": 100}, "the head's width 100"),
        ({"config": DrafterConfig(1000, 96, 768, 2)}, "hidden_size 96"),
        ({"shape": DraftShape(17, 5)}, "16 beams"),
        ({"batch": 32}, "160 rows"),
        ({"config": DrafterConfig(1000, 64, 128, 17)}, "16 residual blocks"),
    ],
)
def test_what_it_cannot_do_is_named(change: dict[str, object], reason: str) -> None:
    assert reason in str(replace(BASE, **change).unsupported())  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("config", [BASE.config, DrafterConfig(2000, 128, 256, 0, rnn=False)])
def test_it_compiles_where_nvrtc_is_installed(config: DrafterConfig, batch: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    plan = replace(BASE, config=config, batch=batch, head_rows=1000, head_columns=config.exit_dim)
    try:
        assert plan.machine_code("sm_90a")
    except RuntimeError as error:  # the bindings are there, the library is not
        pytest.skip(str(error))
