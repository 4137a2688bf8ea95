"""The real thing: build a tiny model with TensorRT-LLM, run it, compare it. `make test-gpu` on a GPU host.

Everything else about the backend is tested against stand-ins made from documentation; this is where they are right or
not. The model has sizes that the kernels for draft tokens are known to cover (heads of 64, groups of 2), and tokens
that rounding leaves alone. Each test has a process of its own (`conftest.py`): one that fails cannot keep the GPU's
memory, and none starts in a process where MPI is initialised already. Models and engines are made once and shared.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.decisive_models import write_decisive_checkpoint
from tests.engines import write_tokenizer
from tests.gpu.conftest import SHARED
from tests.trtllm_options import options, settings
from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import FinishReason, Request, Result, SamplingParams
from trtllm_redrafter.backends.tensorrt_llm.engine_dir import read_engine
from trtllm_redrafter.backends.tensorrt_llm.machine import find_gpus, installed_version
from trtllm_redrafter.backends.tensorrt_llm.options import APIS, Api
from trtllm_redrafter.backends.tensorrt_llm.runner import TensorRTRunner
from trtllm_redrafter.backends.tensorrt_llm.versions import Status, release_for
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.errors import RequestError
from trtllm_redrafter.planning.gpus import GPUS
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.verify.gate import GateRequest, parity_gate

GPU_LIST = find_gpus()
VERSION = installed_version("tensorrt_llm")
RELEASE = release_for(VERSION) if VERSION else None
READY = bool(GPU_LIST) and RELEASE is not None and RELEASE.status is not Status.REFUSED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.own_process if READY else pytest.mark.skip(reason="needs an NVIDIA GPU and TensorRT-LLM 1.2"),
]
PROMPTS = ("one", "a second, longer prompt", "3", "the fourth one")


def target() -> str:
    """The table's row for this GPU, or one of its compute capability with no more memory."""
    here = GPU_LIST[0]
    fitting = [g for g in GPUS.values() if g.compute_capability == here.compute_capability]
    if not fitting:
        pytest.skip(f"no row of the planning table has the compute capability of {here.name}")
    return (here.kind or min(fitting, key=lambda g: g.memory_bytes)).name


@pytest.fixture(scope="module")
def models() -> Path:
    """Made by the first test that asks, for all of them; complete once it has its name."""
    folder = Path(os.environ[SHARED], "models")
    if folder.exists():
        return folder
    work = folder.with_name("models.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    write_tokenizer(work / "tokenizer")
    kinds: dict[str, dict[str, Any]] = {"one": {}, "two": {"tp_size": 2}, "plain": {"drafter": False}}
    for name, changes in kinds.items():
        write_decisive_checkpoint(work / name, **changes)
    return work.rename(folder)


def build(models: Path, name: str = "one", api: Api = "executor") -> Path:
    """Compiled once per checkpoint: the engine for the other interface comes from the cache."""
    engine = models / name / f"engine-{api}"
    if engine.exists():
        return engine
    assert VERSION is not None
    trt = replace(
        settings(), gpu=target(), version=VERSION, cache=True, cache_dir=models / "cache",
        runtime=replace(settings().runtime, api=api),
    )  # fmt: skip
    asked = options(
        trt, checkpoint=models / name / "checkpoint", output=engine, tokenizer=models / "tokenizer",
        max_batch_size=4, max_input_len=200, max_seq_len=400,
    )  # fmt: skip
    backend = load_backend("tensorrt-llm")
    return backend.build(backend.plan(asked), no_progress)


def gate(models: Path, name: str, api: Api = "executor") -> GateRequest:
    return GateRequest(build(models, name, api), models / name / "checkpoint", PROMPTS, 64, None, "auto")


def decode(engine: Path, sampling: SamplingParams) -> list[Result]:
    """One prompt at a time: how a batch is put together may decide a tie."""
    runner = load_backend("tensorrt-llm").load(engine, device="auto", verify_hashes=False)
    try:
        requests = [Request(runner.encode_prompt(text, chat=False), sampling) for text in PROMPTS]
        return [result for request in requests for result in runner.generate([request])]
    finally:
        runner.close()


def test_doctor_agrees() -> None:
    command = [sys.executable, "-m", "trtllm_redrafter", "doctor", "--set", "backend=tensorrt-llm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_builder_did_what_the_plan_said(models: Path) -> None:
    engine = build(models)
    assert not Manifest.read(engine).notes, "the builder changed a value that the plan did not foresee"
    found = read_engine(engine, verify_hashes=True)
    built = json.loads((engine / "config.json").read_text())["build_config"]
    assert found.config.version == VERSION and built["max_draft_len"] == 9
    assert built["speculative_decoding_mode"] == 16


@pytest.mark.parametrize("api", APIS)
def test_tokens_are_the_checkpoints(models: Path, api: Api) -> None:
    report = parity_gate(gate(models, "one", api))
    assert report.ok and report.same > 200, report.render()
    assert report.acceptance_length is not None and report.acceptance_length > 2.0


@pytest.mark.parametrize("api", APIS)
def test_without_a_drafter(models: Path, api: Api) -> None:
    report = parity_gate(gate(models, "plain", api))
    assert report.ok and report.same > 200 and report.acceptance_length is None, report.render()


@pytest.mark.parametrize("sampling", [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, stop=("e",))])
def test_both_interfaces_give_the_same(models: Path, sampling: SamplingParams) -> None:
    """Tokens, text and the reason of the end; and that the LLM API tells the steps apart as the executor does."""
    executor, llm = (decode(build(models, "one", api), sampling) for api in APIS)
    for one, other in zip(executor, llm, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert (one.steps, one.accepted_per_position) == (other.steps, other.accepted_per_position)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("others", [frozenset[int](), frozenset({0})])
def test_the_end_token_ends_the_text(models: Path, api: Api, others: frozenset[int]) -> None:
    """It is the last token and its step is counted, whether the decoder cuts it off or not.

    The smallest end token is the executor's own, which ReDrafter's decoder cuts off; the others are stop words.
    """
    runner = load_backend("tensorrt-llm").load(build(models, api=api), device="auto", verify_hashes=False)
    assert isinstance(runner, TensorRTRunner)
    checked = 0
    try:
        for text in PROMPTS:
            prompt = runner.encode_prompt(text, chat=False)
            (whole,) = runner.generate([Request(prompt, SamplingParams(max_tokens=30, ignore_eos=True))])
            tokens = whole.token_ids
            place = next((i for i in range(2, len(tokens)) if tokens[i] not in {*tokens[:i], *others}), None)
            if place is None or others & {*tokens[:place]}:
                continue  # it repeats itself from the start
            runner._eos = others | {tokens[place]}
            (ended,) = runner.generate([Request(prompt, SamplingParams(max_tokens=30))])
            assert ended.token_ids == tokens[: place + 1] and ended.finish_reason is FinishReason.STOP
            assert (
                ended.steps + ended.accepted_tokens == place
                and sum(ended.accepted_per_position) == ended.accepted_tokens
            )
            checked += 1
    finally:
        runner.close()
    assert checked, "no prompt wrote a new token after its second one"


@pytest.mark.parametrize("api", APIS)
def test_statistics_add_up(models: Path, api: Api) -> None:
    runner = load_backend("tensorrt-llm").load(build(models, api=api), device="auto", verify_hashes=True)
    try:
        requests = [
            Request(runner.encode_prompt(text, chat=False), SamplingParams(max_tokens=50, ignore_eos=True))
            for text in PROMPTS
        ]
        for result in runner.generate(requests):
            assert len(result.token_ids) == 50 and result.finish_reason is FinishReason.LENGTH
            assert result.steps + result.accepted_tokens == 49, "every token after the first belongs to one step"
            assert (
                result.drafted_tokens == 3 * result.steps
                and sum(result.accepted_per_position) == result.accepted_tokens
            )
        updates = list(runner.stream(requests[0]))
        assert sum(len(u.token_ids) for u in updates) == 50 and len(updates) <= 50
        with pytest.raises(RequestError, match="top_k"):
            runner.submit(Request((5,), SamplingParams(max_tokens=5, top_k=3)))
    finally:
        runner.close()


@pytest.mark.skipif(len(GPU_LIST) < 2, reason="needs two GPUs")
@pytest.mark.parametrize("api", APIS)
def test_two_gpus(models: Path, api: Api) -> None:
    report = parity_gate(gate(models, "two", api))
    assert report.ok and report.same > 200, report.render()
