"""The tensorrt backend's networks decode what the torch backend does, token for token, with the same statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="the tensorrt backend needs onnx: pip install -e '.[dev]'")
pytest.importorskip("onnxruntime", reason="its networks are executed by onnxruntime: pip install -e '.[dev]'")

from tests.backends.tensorrt_engines import (
    HostLauncher,
    build_without_compiler,
    load,
    load_on_stand_in,
    load_on_torch,
)
from tests.conversion.fp8 import quantize_fp8
from tests.decisive_models import write_decisive_checkpoint
from tests.engines import build_engine, convert_pair, write_checkpoint, write_tokenizer
from tests.engines import load as load_torch
from tests.prompts.test_sampling import WithNewOption
from tests.tiny_models import FAMILIES, LLAMA3_ROPE, write_base, write_tied_drafter
from trtllm_redrafter.backends.base import Request, Result, Runner, SamplingParams
from trtllm_redrafter.backends.tensorrt.backend import TensorRTBackend
from trtllm_redrafter.errors import RequestError
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.verify import gate
from trtllm_redrafter.verify.reference import ReferenceLogits, reference_logits

PROMPTS = ((5, 9, 23, 7), (3,), (11, 60, 2, 44, 31, 17, 8, 9, 10), (7, 7, 8))
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 0.05, "top_k": 20, "top_p": 0.9},
)
LIMITS = {"max_input_len": 100, "max_seq_len": 200}


def statistics(result: Result) -> dict[str, Any]:
    return {k: v for k, v in result.as_dict().items() if not k.endswith(("seconds", "_per_second", "request_id"))}


def requests(prompts: Sequence[tuple[int, ...]], *, draft: bool, count: int = 40, **sampling: Any) -> list[Request]:
    return [
        Request(prompt, SamplingParams(count + 3 * n, ignore_eos=True, seed=n, **sampling), draft=draft)
        for n, prompt in enumerate(prompts)
    ]


def assert_same(mine: Runner, reference: Runner, prompts: Sequence[tuple[int, ...]] = PROMPTS) -> list[Result]:
    """Batches of one and of all, drafted and not, greedy and sampled; the last drafted greedy results."""
    found: list[Result] = []
    for sampling in SAMPLINGS:
        for draft in (False, True):
            for batch in (prompts[:1], prompts):
                asked = requests(batch, draft=draft, **sampling)
                results = mine.generate(asked)
                assert [statistics(r) for r in results] == [statistics(r) for r in reference.generate(asked)]
                found = results if draft and not sampling else found
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_the_torch_backend(tmp_path: Path, family: str) -> None:
    checkpoint = write_checkpoint(tmp_path, family, tie_word_embeddings=family == "mistral")
    mine = load(build_without_compiler(checkpoint, tmp_path / "steps"))
    assert_same(mine, load_torch(build_engine(checkpoint, tmp_path / "engine")))


def test_accepted_drafts_are_moved_to_their_places(tmp_path: Path) -> None:
    """Whole drafts are accepted here, in every beam, so that each step's keys are read from the last step's tree."""
    checkpoint = write_decisive_checkpoint(tmp_path, dtype="float32")
    mine = load(build_without_compiler(checkpoint, tmp_path / "steps", **LIMITS))
    torch_runner = load_torch(build_engine(checkpoint, tmp_path / "engine", **LIMITS))
    prompts = ((79, 8, 130), (200,), (45, 46, 47, 48, 49, 50, 51), (3, 250, 17, 91))
    for result in assert_same(mine, torch_runner, prompts):
        assert result.acceptance_length is not None and result.acceptance_length > 2.5


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "vocab_size": 80},  # of 64, two logits tie at a threshold
        {"rope_scaling": LLAMA3_ROPE},
        {"tp_size": 2, "drafter_changes": {"rnn": False, "exit_dim": 48}},
        {"num_beams": 1, "draft_len": 1},
        {"vocab_size": 130, "num_beams": 5, "draft_len": 5},
    ],
    ids=["bias", "llama3", "two ranks, no rnn, input projection", "1 x 1", "cut candidates"],
)
def test_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    checkpoint = write_checkpoint(tmp_path, "llama", **changes)
    mine = load(build_without_compiler(checkpoint, tmp_path / "steps"))
    assert_same(mine, load_torch(build_engine(checkpoint, tmp_path / "engine")))


def test_drafts_from_the_most_frequent_tokens(tmp_path: Path) -> None:
    rows = tuple(range(95, 15, -1))
    write_base(tmp_path / "base", "llama")
    write_tied_drafter(tmp_path / "drafter", draft_vocab=(*rows, *range(16)))
    checkpoint = convert_pair(tmp_path)
    mine = load(build_without_compiler(checkpoint, tmp_path / "steps"))
    assert_same(mine, load_torch(build_engine(checkpoint, tmp_path / "engine")))


def test_eight_bit_weights(tmp_path: Path) -> None:
    """Stored as FP8 and multiplied by their scales within the network: the numbers that the torch backend reads."""
    checkpoint = quantize_fp8(write_checkpoint(tmp_path, "llama"), tmp_path / "fp8", ["lm_head", "drafter*"])
    mine = load(build_without_compiler(checkpoint, tmp_path / "steps"))
    assert_same(mine, load_torch(build_engine(checkpoint, tmp_path / "engine")))


@pytest.mark.parametrize(
    ("dtype", "loaded"), [("float16", load), ("float16", load_on_torch), ("bfloat16", load_on_torch)]
)
def test_sixteen_bits(tmp_path: Path, dtype: str, loaded: Callable[[Path], Runner]) -> None:
    """With fused attention, on a model whose tokens hardly hang on rounding; bfloat16 on PyTorch's operators."""
    checkpoint = write_decisive_checkpoint(tmp_path, dtype=dtype)
    mine = loaded(build_without_compiler(checkpoint, tmp_path / "steps", **LIMITS))
    reference = load_torch(build_engine(checkpoint, tmp_path / "engine", **LIMITS))
    prompts = ((200,), (45, 46, 47, 48, 49, 50, 51), (3, 250, 17, 91))
    for draft in (False, True):
        asked = requests(prompts, draft=draft)
        results = mine.generate(asked)
        assert [r.token_ids for r in results] == [r.token_ids for r in reference.generate(asked)]
        assert not draft or all((r.acceptance_length or 0) > 2.5 for r in results)


def test_a_second_executor_agrees(tmp_path: Path) -> None:
    """PyTorch's operators, one by one as the specification says: no network depends on what one runtime does."""
    checkpoint = write_checkpoint(tmp_path, "qwen3")
    engine = build_without_compiler(checkpoint, tmp_path / "steps")
    assert_same(load_on_torch(engine), load(engine))


def test_prompts_longer_than_a_chunk(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "llama", max_position_embeddings=1024)
    limits = {"max_input_len": 700, "max_seq_len": 800}
    mine = load(build_without_compiler(checkpoint, tmp_path / "steps", **limits))
    prompts = tuple(tuple((k * i) % 64 for i in range(size)) for k, size in ((7, 600), (5, 256), (3, 257)))
    assert_same(mine, load_torch(build_engine(checkpoint, tmp_path / "engine", **limits)), prompts)


def test_base_only(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "qwen2", drafter=False)
    mine = load(build_without_compiler(checkpoint, tmp_path / "steps"))
    assert mine.info.draft_shape is None
    assert_same(mine, load_torch(build_engine(checkpoint, tmp_path / "engine")))


def test_requests_join_and_leave(tmp_path: Path) -> None:
    """More requests than slots, of different lengths: texts do not depend on the company."""
    checkpoint = write_checkpoint(tmp_path, "llama")
    mine = load(build_without_compiler(checkpoint, tmp_path / "steps", max_batch_size=2))
    asked = [
        Request((5 + n, 9), SamplingParams(3 + 7 * (n % 4), ignore_eos=True, temperature=0.9 * (n % 2), seed=n))
        for n in range(9)
    ]
    together = mine.generate(asked)
    assert [r.token_ids for r in together] == [mine.generate([request])[0].token_ids for request in asked]


def test_one_that_ends_at_the_limit_leaves_its_slot_usable(tmp_path: Path) -> None:
    """Its last step may accept more than it may write, which lies beyond the limit, while its neighbours go on."""
    checkpoint = write_decisive_checkpoint(tmp_path, dtype="float32")
    limit = 256 - 3 - 10  # with moved rows and a tree, the cache has no position to spare
    mine = load(build_without_compiler(checkpoint, tmp_path / "steps", max_input_len=limit - 1, max_seq_len=limit))
    long = [Request((79, 8, 130) * n, SamplingParams(limit - 3 * n, ignore_eos=True)) for n in (80, 79, 78, 70)]
    others = [Request((200,), SamplingParams(150, ignore_eos=True)), *long]
    for batch in (long, others[:4], [*others, *long]):
        together = mine.generate(batch)
        assert [r.token_ids for r in together] == [mine.generate([request])[0].token_ids for request in batch]


def test_onnxruntime_drafts_another_shape(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "llama")
    engine = build_without_compiler(checkpoint, tmp_path / "steps")
    mine = load(engine, DraftShape(2, 5))
    assert mine.info.draft_shape == DraftShape(2, 5)
    assert_same(mine, load_torch(build_engine(checkpoint, tmp_path / "engine"), DraftShape(2, 5)))


def test_plans_run_at_the_addresses_they_are_given(tmp_path: Path) -> None:
    """The GPU's programs on a stand-in: the first pass of a kind is launched, the second captured, others replayed."""
    checkpoint = write_decisive_checkpoint(tmp_path, dtype="float32")
    engine, launcher = build_without_compiler(checkpoint, tmp_path / "steps", **LIMITS), HostLauncher()
    mine = load_on_stand_in(engine, launcher)
    assert_same(mine, load(engine), ((79, 8, 130), (200,), (45, 46, 47, 48, 49, 50, 51), (3, 250, 17, 91)))
    log = launcher.log
    assert log.count("begin") == log.count("wait") == log.count("enqueue")
    assert 0 < log.count("capture") < log.count("enqueue") / 10
    first = log.index("capture")
    assert log[first - 1] == "begin" and log[first + 1] == "enqueue", "a capture runs nothing itself"


@pytest.mark.parametrize("greedy", [True, False])
def test_the_parity_gate_takes_it_by_the_models_own_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, greedy: bool
) -> None:
    """Not by TensorRT-LLM's: its epsilon of q and k norms, and its engines that can only sample."""
    checkpoint = write_checkpoint(tmp_path, "qwen3", rms_norm_eps=1e-6, vocab_size=259)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "manifest.json").unlink()  # it has the config's hash
    (checkpoint / "config.json").write_text(json.dumps(config | {"redrafter_greedy_search": greedy}))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    engine = build_without_compiler(checkpoint, tmp_path / "steps", tokenizer=tokenizer, **LIMITS)
    monkeypatch.setattr(TensorRTBackend, "load", partialmethod(TensorRTBackend.load, api="onnxruntime"))
    asked: list[float | None] = []

    def compute(*args: Any, qk_epsilon: float | None) -> ReferenceLogits:
        asked.append(qk_epsilon)
        return reference_logits(*args, qk_epsilon=qk_epsilon)

    monkeypatch.setattr(gate, "reference_logits", compute)
    report = gate.parity_gate(gate.GateRequest(engine, checkpoint, ("a b", "c"), 12, None, "cpu"))
    assert asked == [None] and not report.sampled
    assert report.ok, report.render()


def test_an_option_that_the_networks_do_not_know_is_refused(tmp_path: Path) -> None:
    """One that is added to the list of options has to be added to the networks, not ignored by them."""
    runner = load(build_without_compiler(write_checkpoint(tmp_path), tmp_path / "steps"))
    with pytest.raises(RequestError, match=r"new_option is 0\.1"):
        runner.submit(Request((5,), WithNewOption(3, new_option=0.1)))
    assert not runner.has_work and len(runner.generate([Request((5,), WithNewOption(3))])[0].token_ids) == 3
