"""How many rows of a drafter's LM head an engine computes."""

from __future__ import annotations

import pytest

from trtllm_redrafter.backends.torch.build_plan import draft_head_rows


@pytest.mark.parametrize(
    ("vocab_size", "rows"),
    [(32000, 8192), (49152, 8192), (128256, 20480), (151936, 24576)],
    ids=["llama-2", "smollm2", "llama-3", "qwen2.5"],
)
def test_a_sixth_of_the_vocabulary_but_never_less_than_before(vocab_size: int, rows: int) -> None:
    assert draft_head_rows(vocab_size) == rows
