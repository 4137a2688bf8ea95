"""The parity gate on engines that are right, and on ones that are wrong in each way it looks for."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.tiny import Program
from tests.engines import build_engine, write_checkpoint, write_tokenizer
from tests.standins.host import make_host
from tests.trtllm_options import options, settings
from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.base import Result
from trtllm_redrafter.checkpoint.config import read_checkpoint_config
from trtllm_redrafter.checkpoint.layout import tensor_specs
from trtllm_redrafter.checkpoint.safetensors_io import save_tensors
from trtllm_redrafter.errors import InputError, MismatchError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.verify import gate_decode, token_checks
from trtllm_redrafter.verify.gate import GateReport, GateRequest, parity_gate, reference_device

PROMPTS = ("one", "a second prompt", "3")
VOCAB = 259


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32 and in bfloat16, and a torch engine of each."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = write_tokenizer(folder / "tokenizer")
    for dtype in ("float32", "bfloat16"):
        heads = {"head_dim": 32} if dtype == "bfloat16" else {}  # those TensorRT-LLM has kernels for
        checkpoint = write_checkpoint(folder / dtype, dtype=dtype, vocab_size=VOCAB, **heads)
        build_engine(checkpoint, folder / dtype / "engine", tokenizer)
    return folder


def request(models: Path, dtype: str = "float32", **changes: Any) -> GateRequest:
    made = GateRequest(
        models / dtype / "engine", models / dtype / "checkpoint", PROMPTS, max_tokens=40, min_acceptance=None,
        device="cpu",
    )  # fmt: skip
    return replace(made, **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_of_the_same_checkpoint_passes(models: Path, dtype: str) -> None:
    report = parity_gate(request(models, dtype))
    assert report.ok, report.render()
    assert report.same + report.ties == sum(len(ids) for ids in report.token_ids) > 40 and not report.faults
    assert report.acceptance_length == report.reference_acceptance_length and "passes" in report.render()
    assert not list((models / dtype).glob(".redrafter-gate-*"))


def with_changed_engine(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Result]], None]) -> None:
    """Spoil what the engine under test answers; the reference stays as it is."""
    original = gate_decode._generate

    def generate(*arguments: Any) -> Any:
        results, accepted = original(*arguments)
        change(results)
        return results, [None] * len(accepted)

    monkeypatch.setattr(gate_decode, "_generate", generate)


def says(report: GateReport) -> str:
    assert not report.ok
    return report.render()


def test_a_wrong_token_is_a_fault(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(results: list[Result]) -> None:
        results[1].token_ids[4] = (results[1].token_ids[4] + 1) % VOCAB

    with_changed_engine(monkeypatch, change)
    report = parity_gate(request(models))
    assert (
        len(report.faults) == 1
        and "token 5 of prompt 2" in says(report)
        and "rounding in float32 explains" in says(report)
    )


def test_ties_are_told_from_faults_and_counted(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_checks, "NOISE", 1e9)  # so that rounding "explains" anything

    def change(results: list[Result]) -> None:
        results[0].token_ids[:] = [(t + 1) % VOCAB for t in results[0].token_ids]

    with_changed_engine(monkeypatch, change)
    report = parity_gate(request(models))
    assert not report.faults and report.ties > 10 and "too many numeric ties" in says(report)


def test_a_drafter_that_is_not_connected_is_found(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(results: list[Result]) -> None:
        for result in results:
            result.steps, result.accepted_tokens = len(result.token_ids) - 1, 0

    with_changed_engine(monkeypatch, never)
    assert "no draft was ever accepted" in says(parity_gate(request(models)))


def test_a_verification_that_accepts_all_is_found(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(results: list[Result]) -> None:
        for result in results:
            result.steps, result.accepted_tokens = 20, 20 * 3

    with_changed_engine(monkeypatch, always)
    assert "every draft was accepted" in says(parity_gate(request(models)))


def test_another_acceptance_is_found(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def more(results: list[Result]) -> None:
        for result in results:
            result.steps, result.accepted_tokens = 20, 20

    with_changed_engine(monkeypatch, more)
    assert "acceptance differs" in says(parity_gate(request(models)))


def test_a_floor(models: Path) -> None:
    assert "the floor is 3.90" in says(parity_gate(request(models, min_acceptance=3.9)))


def test_repeats_and_empty_answers_alarm(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(results: list[Result]) -> None:
        results[0].token_ids[:] = [0] * 20
        results[1].token_ids.clear()

    with_changed_engine(monkeypatch, broken)
    text = says(parity_gate(request(models)))
    assert "repeats one token 20 times" in text and "prompt 2 has no tokens" in text


def test_too_little_text_is_no_proof(models: Path) -> None:
    assert "too little was written" in says(parity_gate(request(models, prompts=("one",), max_tokens=3)))


def test_another_model_is_refused_at_once(models: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", num_hidden_layers=3, vocab_size=VOCAB)
    with pytest.raises(MismatchError, match="num_hidden_layers is 2 there, 3 here"):
        parity_gate(request(models, reference=other))


def test_a_reference_whose_tensors_do_not_fit_is_refused(models: Path, tmp_path: Path) -> None:
    """Found by the mutation campaign: two tensors of a reference had each other's names."""
    shutil.copytree(models / "float32" / "checkpoint", tmp_path / "damaged")
    file = tmp_path / "damaged" / "rank0.safetensors"
    tensors = load_file(file)
    one, other = "transformer.layers.0.attention.qkv.weight", "transformer.layers.0.mlp.gate.weight"
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    save_tensors(file, tensors)
    with pytest.raises(InputError, match=r"do not fit its config\.json"):
        parity_gate(request(models, reference=tmp_path / "damaged"))


def test_an_engine_of_tensorrt_llm_that_writes_nonsense_fails(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in's tokens follow a rule of its own: the gate must say so, through the command."""
    make_host(tmp_path / "host", monkeypatch)
    backend = load_backend("tensorrt-llm")
    asked = options(
        settings(cache_dir=tmp_path / "cache"), checkpoint=models / "bfloat16" / "checkpoint",
        output=tmp_path / "engine", tokenizer=models / "tokenizer",
        max_batch_size=4, max_input_len=100, max_seq_len=200,
    )  # fmt: skip
    engine = backend.build(backend.plan(asked), no_progress)
    program = Program(capsys)
    flags = ["verify", engine, "--reference", models / "bfloat16" / "checkpoint", "--max-tokens", 40, "--json"]
    assert program(*flags) == 8 and "faults" in program.err and program.document["faults"]
    flags = ["verify", models / "float32" / "engine", "--reference", models / "float32" / "checkpoint"]
    assert program(*flags, "--max-tokens", 40, "--prompt", "one", "--prompt", "two", "--json") == 0, program.err
    assert program.document["ok"] and program.document["acceptance_length"]


def test_a_reference_that_no_gpu_holds_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a 70B engine over four GPUs: after hours of building it must not end in an out-of-memory error."""
    model = read_checkpoint_config(write_checkpoint(tmp_path, tp_size=2))
    whole = sum(math.prod(spec.shape) for spec in tensor_specs(model).values()) * 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reference_device(model) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, device in ((whole, "cpu"), (2 * whole, "cuda")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        assert reference_device(model) == device
