"""Engines of the tensorrt backend on the card they are compiled for: an RTX card with TensorRT-RTX, any with TensorRT.

Nobody has run these yet. They need the GPU, one of the two compilers, onnx, and a card in the table of `planning.gpus`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx", reason="the tensorrt backend needs onnx")

from tests.backends.tensorrt_engines import build
from tests.backends.test_tensorrt_decode import LIMITS, PROMPTS, assert_same, requests, statistics
from tests.decisive_models import write_decisive_checkpoint
from tests.engines import build_engine, write_checkpoint
from tests.engines import load as load_torch
from tests.tiny_models import FAMILIES
from trtllm_redrafter.backends.tensorrt.backend import TensorRTBackend
from trtllm_redrafter.backends.tensorrt.compilers import choose_compiler, import_compiler
from trtllm_redrafter.backends.tensorrt.runner import StepRunner
from trtllm_redrafter.errors import BackendError
from trtllm_redrafter.planning.gpus import gpu_by_driver_name


def card() -> str | None:
    """The table's name of this machine's GPU, if a compiler for it is installed."""
    found = gpu_by_driver_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if found is None:
        return None
    try:
        import_compiler(choose_compiler(found, "float16"))
    except BackendError:
        return None
    return found.name


CARD = card()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.own_process,
    pytest.mark.skipif(CARD is None, reason="needs a GPU of the table and a TensorRT compiler for it"),
]


def on_card(checkpoint: Path, output: Path, **limits: int) -> StepRunner:
    assert CARD is not None
    engine = build(checkpoint, output, gpu=CARD, **limits)
    return TensorRTBackend().load(engine, device="cuda", verify_hashes=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_cpus(tmp_path: Path, family: str) -> None:
    checkpoint = write_checkpoint(tmp_path, family)
    mine = on_card(checkpoint, tmp_path / "steps")
    assert_same(mine, load_torch(build_engine(checkpoint, tmp_path / "engine")))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_follow_the_torch_backend(tmp_path: Path, dtype: str) -> None:
    """On a model whose tokens do not hang on rounding; drafts are accepted, and change nothing."""
    checkpoint = write_decisive_checkpoint(tmp_path, dtype=dtype)
    mine = on_card(checkpoint, tmp_path / "steps", **LIMITS)
    reference = load_torch(build_engine(checkpoint, tmp_path / "engine", **LIMITS))
    prompts = ((79, 8, 130), (200,), (45, 46, 47, 48, 49, 50, 51), (3, 250, 17, 91))
    for draft in (False, True):
        asked = requests(prompts, draft=draft)
        results, others = mine.generate(asked), reference.generate(asked)
        assert [r.token_ids for r in results] == [r.token_ids for r in others]
        assert not draft or all((r.acceptance_length or 0) > 2.5 for r in results)


def test_graphs_are_replayed_for_every_batch(tmp_path: Path) -> None:
    """A step is captured at its second time, for each number of rows; texts stay what they were at the first."""
    mine = on_card(write_checkpoint(tmp_path, "llama", dtype="float16", head_dim=16), tmp_path / "steps")
    for batch in (PROMPTS, PROMPTS[:1], PROMPTS[:3]):
        first, *others = (mine.generate(requests(batch, draft=True)) for _ in range(3))
        for again in others:
            assert [statistics(r) for r in again] == [statistics(r) for r in first]
