"""Faults planted in engines, one of each kind, and what sees them; intact engines of every dtype, which pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.tiny import Program
from tests.engines import build_engine, load, write_checkpoint, write_tokenizer
from tests.standins.host import make_host
from tests.trtllm_options import options, settings
from trtllm_redrafter.backends import load_backend
from trtllm_redrafter.backends.torch.weights import load_weights
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.verify import reference
from trtllm_redrafter.verify.distributions import check_distributions
from trtllm_redrafter.verify.gate import GateReport, GateRequest, parity_gate
from trtllm_redrafter.verify.reference import Text, reference_logits, tensorrt_qk_epsilon
from trtllm_redrafter.verify.steps import SingleSteps

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 259, "head_dim": 32}
PROMPTS = ("one", "a second prompt", "3")
Tensors = dict[str, Tensor]
LAYER = "transformer.layers.1."


def gate(engine: Path, checkpoint: Path) -> GateReport:
    return parity_gate(GateRequest(engine, checkpoint, PROMPTS, 40, None, "cpu"))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16 and a tokenizer."""
    folder = tmp_path_factory.mktemp("intact")
    write_tokenizer(folder / "tokenizer")
    write_checkpoint(folder, dtype="bfloat16", **SIZES)
    return folder


def spoiled(intact: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """An engine built from a copy of the checkpoint with other weights and no manifest."""
    wrong = folder / "checkpoint"
    shutil.copytree(intact / "checkpoint", wrong)
    (wrong / "manifest.json").unlink()
    tensors = load_file(wrong / "rank0.safetensors")
    change(tensors)
    save_file(tensors, wrong / "rank0.safetensors", metadata={"format": "pt"})
    return build_engine(wrong, folder / "engine", intact / "tokenizer")


def times(name: str, factor: float) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name] *= factor

    return apply


def at(name: str, place: tuple[int, ...], change: Callable[[Tensor], Tensor | float]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name][place] = change(tensors[name][place])

    return apply


SEEN_IN_LOGITS = {
    "one weight = 100": at(LAYER + "mlp.proj.weight", (7, 11), lambda w: 100.0),
    "one attention weight = 100": at(LAYER + "attention.qkv.weight", (7, 11), lambda w: 100.0),
    "one weight + 1": at(LAYER + "mlp.proj.weight", (7, 11), lambda w: w + 1),
    "one norm weight x 4": at(LAYER + "input_layernorm.weight", (5,), lambda w: w * 4),
    "final norm x 1.05": times("transformer.ln_f.weight", 1.05),
    "one MLP x 1.1": times(LAYER + "mlp.proj.weight", 1.1),
    "one row of the head x 1.2": at("lm_head.weight", (30,), lambda row: row * 1.2),
}
SEEN_IN_THE_DRAFTER = {
    "one weight = 100": at("drafter.layers.0.linear.weight", (3, 5), lambda w: 100.0),
    "one bias = 5": at("drafter.layers.0.linear.bias", (3,), lambda w: 5.0),
    "one head weight = 100": at("drafter.lm_head.weight", (40, 5), lambda w: 100.0),
    "recurrence x 1.2": times("drafter.rnn_u.weight", 1.2),
}


@pytest.mark.parametrize("fault", SEEN_IN_LOGITS)
def test_faults_of_the_base_model_are_seen_in_its_logits(intact: Path, tmp_path: Path, fault: str) -> None:
    report = gate(spoiled(intact, tmp_path, SEEN_IN_LOGITS[fault]), intact / "checkpoint")
    assert report.distributions is not None and report.distributions.exceeded(), report.render()
    assert report.drafts is not None and report.drafts.ok, report.render()
    assert any("differs from the checkpoint's" in p.what for p in report.alarms)  # bit for bit, beside that


def test_logits_that_are_not_finite_are_named() -> None:
    exact = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    found = exact + 1e-3
    found[2, 7], found[4, 0] = float("nan"), float("inf")
    measured = check_distributions([(found, exact, exact * 1.001, [exact * 0.999])], "bfloat16")
    [problem] = measured.problems(Path("engine"))
    assert problem.what == "logits are not finite at 2 of 6 positions" and not measured.exceeded()
    nothing = check_distributions([(found * float("nan"), exact, exact, [exact])], "bfloat16")
    assert nothing.not_finite == 6 and len(list(nothing.problems(Path("engine")))) == 1


@pytest.mark.parametrize("fault", SEEN_IN_THE_DRAFTER)
def test_faults_of_the_drafter_are_seen_in_its_scores(intact: Path, tmp_path: Path, fault: str) -> None:
    report = gate(spoiled(intact, tmp_path, SEEN_IN_THE_DRAFTER[fault]), intact / "checkpoint")
    assert report.drafts is not None and not report.drafts.ok, report.render()
    assert report.distributions is not None and not report.distributions.exceeded() and not report.faults
    assert "the drafter's log-probabilities are further from exact" in report.render()


def test_what_rounding_hides_is_seen_bit_for_bit(intact: Path, tmp_path: Path) -> None:
    """One weight x 1.01 moves logits by less than bfloat16 rounds them, whatever is compared."""
    engine = spoiled(intact, tmp_path, at(LAYER + "mlp.proj.weight", (7, 11), lambda w: w * 1.01 + 2.0**-9))
    report = gate(engine, intact / "checkpoint")
    assert report.distributions is not None and not report.distributions.exceeded() and not report.faults
    [alarm] = report.alarms
    assert "'transformer.layers.1.mlp.proj.weight' differs from the checkpoint's" in alarm.what


def test_an_epsilon_is_seen_in_the_config(intact: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "checkpoint"
    shutil.copytree(intact / "checkpoint", wrong)
    (wrong / "manifest.json").unlink()
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"norm_epsilon": 1e-4}))
    report = gate(build_engine(wrong, tmp_path / "engine", intact / "tokenizer"), intact / "checkpoint")
    assert [p.what for p in report.alarms] == ["norm_epsilon is 0.0001 in the engine, 1e-05 in the checkpoint"]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_intact_engines_pass(tmp_path: Path, family: str, dtype: str, seed: int) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    checkpoint = write_checkpoint(tmp_path, family, dtype=dtype, seed=seed, drafter=seed == 1, **SIZES)
    report = gate(build_engine(checkpoint, tmp_path / "engine", tokenizer), checkpoint)
    assert report.ok and not report.not_seen, report.render()
    assert (report.drafts is None) == (seed == 2) and report.weights


def test_verify_compares_drafters_and_engines_with_what_they_were_made_from(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, fault = Program(capsys), at("drafter.layers.0.linear.bias", (3,), lambda w: 5.0)
    right = build_engine(intact / "checkpoint", tmp_path / "right", intact / "tokenizer")
    (tmp_path / "wrong").mkdir()
    wrong = spoiled(intact, tmp_path / "wrong", fault)
    base, drafter = ["--against", intact / "base"], ["--drafter", intact / "drafter"]
    assert program("verify", right, *base, *drafter, "--json") == 0, program.err
    checks = "\n".join(program.document["checks"])
    assert "drafter tensors" in checks and "greedy tokens" in checks and "logits at" in checks
    assert program("verify", wrong, *base) == 0 and "--drafter DIR compares them" in program.out
    assert program("verify", wrong, *drafter) == 8
    assert "tensor 'drafter.layers.0.linear.bias' differs from the drafter's" in program.err
    assert program("verify", right, "--against", intact / "checkpoint") == 0, program.err
    assert program("verify", wrong, "--against", intact / "checkpoint") == 8
    assert "'drafter.layers.0.linear.bias' differs from the checkpoint's" in program.err


def compiled(checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine of the stand-in for TensorRT-LLM."""
    make_host(folder / "host", monkeypatch)
    asked = options(
        settings(cache_dir=folder / "cache"), checkpoint=checkpoint, output=folder / "compiled",
        tokenizer=checkpoint.parent / "tokenizer", max_batch_size=4, max_input_len=100, max_seq_len=200,
    )  # fmt: skip
    backend = load_backend("tensorrt-llm")
    return backend.build(backend.plan(asked), no_progress)


def test_a_compiled_engine_shows_logits_at_the_ends_of_prompts(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stand-in computes them with a torch engine; asked while drafts are verified, it refuses as the real one."""
    engine = compiled(intact / "checkpoint", tmp_path, monkeypatch)
    right = build_engine(intact / "checkpoint", tmp_path / "right", intact / "tokenizer")
    wrong = spoiled(intact, tmp_path, SEEN_IN_LOGITS["final norm x 1.05"])
    request = GateRequest(engine, intact / "checkpoint", PROMPTS, 40, None, "auto")
    monkeypatch.setenv("STANDIN_LOGITS", str(right))
    report = parity_gate(request)
    assert report.distributions is not None and not report.distributions.exceeded(), report.render()
    assert report.distributions.positions == 16 * 7 and "at the ends of prompts only" in report.render()
    monkeypatch.setenv("STANDIN_LOGITS", str(wrong))
    report = parity_gate(request)
    assert report.distributions is not None and "scale" in report.distributions.exceeded(), report.render()
    monkeypatch.setenv("STANDIN_RUN", "no-logits")
    report = parity_gate(request)
    assert report.distributions is None and "logits: not shown (TensorRT-LLM returned no logits)" in report.render()


def test_a_compiled_engine_shows_its_config_and_says_what_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    checkpoint = write_checkpoint(tmp_path, "qwen3", dtype="bfloat16", rms_norm_eps=1e-6, **SIZES)
    engine = compiled(checkpoint, tmp_path, monkeypatch)
    program = Program(capsys)
    assert program("verify", engine, "--against", tmp_path / "base") == 0, program.err
    assert "fields of the engine's config" in program.out and "compiled into the engine" in program.out
    report = parity_gate(GateRequest(engine, checkpoint, PROMPTS, 40, None, "auto"))
    unseen = "\n".join(report.not_seen)
    assert report.weights is report.distributions is report.drafts is None
    for word in ("weights:", "logits:", "drafter:", "computes with 1e-05, the model says 1e-06"):
        assert word in unseen
    config = json.loads((engine / "config.json").read_text())
    config["pretrained_config"]["rotary_base"] = 5000.0
    (engine / "config.json").write_text(json.dumps(config))
    (engine / "manifest.json").unlink()
    assert program("verify", engine, "--against", tmp_path / "base") == 8
    assert "rotary_base is 5000.0, the model's is 10000.0" in program.err


def test_single_steps_by_hand() -> None:
    # the engine's steps begin at tokens 0, 3, 4, 6; the replay's at 0, 3, 5, 6
    assert SingleSteps.of([(2, 0, 1, 3)], [(2, 1, 0, 3)]) == SingleSteps(compared=2, apart=1)
    assert SingleSteps.of([None], [(2, 1, 0)]) == SingleSteps(0, 0)


def test_the_reference_follows_tensorrt_llms_epsilon(tmp_path: Path) -> None:
    """Its q and k norms take 1e-5 whatever the model says; in float32 the difference shows."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, "qwen3", drafter=False, rms_norm_eps=1e-6))
    assert tensorrt_qk_epsilon(checkpoint.config) == 1e-5
    texts = [Text((5, 6, 7), (8, 9, 10))]
    ours, theirs = (reference_logits(checkpoint, texts, "cpu", qk_epsilon=e).exact.logits(0) for e in (None, 1e-5))
    assert 1e-8 < float((ours - theirs).abs().max()) < 1e-3
    llama = Checkpoint.open(write_checkpoint(tmp_path / "llama", drafter=False))
    assert tensorrt_qk_epsilon(llama.config) is None


def test_a_large_reference_reads_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, dtype="bfloat16"))
    texts = [Text((5, 6, 7), (8, 9, 10)), Text((1,), (2, 3))]
    whole = reference_logits(checkpoint, texts, "cpu")
    monkeypatch.setattr(reference, "STREAM_ABOVE", 0)
    streamed = reference_logits(checkpoint, texts, "cpu")
    for one, other in ((whole.exact, streamed.exact), (whole.rounded, streamed.rounded)):
        assert torch.equal(one.logits(1), other.logits(1))
    layers = load_weights(checkpoint, torch.device("cpu"), streamed=True).layers
    assert len(layers) == 2 and len(layers[:1]) == 1
    with pytest.raises(IndexError):
        layers[2]


def test_a_runner_shows_what_it_computes_as_it_decodes(tmp_path: Path) -> None:
    runner = load(build_engine(write_checkpoint(tmp_path), tmp_path / "engine"))
    tokens = list(range(20, 50))
    found = runner.teacher_forced((5, 6, 7), tokens)
    whole = runner.teacher_forced((5, 6, 7, *tokens[:29]), tokens[29:])  # the last position, from a prompt
    assert found.logits.shape == (30, runner.info.vocab_size) and found.states is not None
    torch.testing.assert_close(found.logits[29:], whole.logits, atol=1e-4, rtol=1e-4)
    beams = runner.drafts(found.states, [1] * 30)
    assert beams is not None and beams.tokens.shape == (30, 4, 4)
