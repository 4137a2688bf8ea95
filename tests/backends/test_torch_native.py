"""The compiled kernels: the same function as plain PyTorch, and rows that do not feel their neighbours."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engines import build_engine, convert_pair, load, make_runner, with_oracle, write_checkpoint
from tests.tiny_models import FAMILIES, write_base, write_tied_drafter
from trtllm_redrafter.backends.base import Request, SamplingParams
from trtllm_redrafter.backends.torch.drafting import load_drafter
from trtllm_redrafter.backends.torch.native import compiled, library
from trtllm_redrafter.backends.torch.native.drafter import NativeSearch
from trtllm_redrafter.backends.torch.native.executor import NativeExecutor
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.backends.torch.transformer import TorchExecutor
from trtllm_redrafter.backends.torch.weights import load_weights
from trtllm_redrafter.checkpoint.names import ENGINE_CHECKPOINT
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import MismatchError
from trtllm_redrafter.redrafter.beam_search import beam_search, draft_head
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.token_tree import Tree

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("c++", "g++", "clang++")), reason="no C++ compiler: the PyTorch executor serves"
)
pytestmark = needs_compiler

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "torch_dtype": "bfloat16",
    "head_dim": 16,
}
PROMPTS = ((5, 9, 23, 7), (3,), tuple(range(10, 60)))


@pytest.fixture(scope="module", params=FAMILIES)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    folder = tmp_path_factory.mktemp(request.param)
    made = make_runner(folder, request.param, num_beams=5, **SIZES)
    assert made.executor.name == "native"
    return made


def plain_executor(runner: TorchRunner, dtype: torch.dtype) -> TorchExecutor:
    """The PyTorch executor on the same weights, in another dtype."""
    checkpoint = Checkpoint.open(runner.info.path / ENGINE_CHECKPOINT)
    weights = load_weights(checkpoint, torch.device("cpu"))

    def cast(value: object) -> object:
        return value.to(dtype) if isinstance(value, Tensor) else value

    layers = tuple(type(x)(**{k: cast(v) for k, v in vars(x).items()}) for x in weights.layers)
    fields = {k: cast(v) for k, v in vars(weights).items()} | {"layers": layers}
    return TorchExecutor(checkpoint.config, type(weights)(**fields), max_batch_size=4, capacity=256)


def test_logits_are_as_near_to_float32_as_pytorchs(runner: TorchRunner) -> None:
    prompt = list(range(3, 63))
    exact = plain_executor(runner, torch.float32).prefill(0, prompt).logits
    pytorch = plain_executor(runner, torch.bfloat16).prefill(0, prompt).logits.float()
    native = runner.executor.prefill(0, prompt).logits
    assert (native - exact).norm() < 1.5 * (pytorch - exact).norm()
    assert (native - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=120, ignore_eos=True),
        SamplingParams(max_tokens=60, temperature=0.8, top_k=20, top_p=0.95, seed=7, ignore_eos=True),
    ],
    ids=["greedy", "sampled"],
)
def test_drafting_and_autoregression_agree_in_bfloat16(runner: TorchRunner, sampling: SamplingParams) -> None:
    plain = [runner.generate([Request(p, sampling, draft=False)])[0].token_ids for p in PROMPTS]
    real, shape = runner._drafting, DraftShape(5, 3)
    assert [r.token_ids for r in runner.generate([Request(p, sampling) for p in PROMPTS])] == plain
    try:
        with_oracle(runner, dict(zip(PROMPTS, plain, strict=True)), shape)
        good = runner.generate([Request(p, sampling) for p in PROMPTS])
    finally:
        runner._drafting = real
    assert [r.token_ids for r in good] == plain
    assert all(r.accepted_tokens > 20 for r in good)


def test_a_row_does_not_depend_on_its_company(runner: TorchRunner) -> None:
    """Bits of every node of a branching tree, against the same tokens computed one at a time."""
    executor = runner.executor
    prompt, base = list(range(20, 45)), 25
    beams = [[9, 4, 7, 1], [9, 4, 8, 2], [9, 5, 7, 1]]
    tree = Tree.merge(beams)
    executor.prefill(0, prompt)
    whole = executor.forward([0], [base], [tree], logits=True)
    assert whole.logits is not None
    for node, path in enumerate(tree.paths()):
        executor.prefill(1, prompt)
        for depth, ancestor in enumerate(path):
            alone = executor.forward([1], [base + depth], [Tree.root(tree.tokens[ancestor])], logits=True)
        assert alone.logits is not None
        assert torch.equal(alone.logits[0], whole.logits[node])
        assert torch.equal(alone.hidden[0], whole.hidden[node])
        assert int(alone.best[0]) == int(alone.logits[0].argmax()) == int(whole.best[node])


def test_beams_are_the_plain_searchs(runner: TorchRunner) -> None:
    checkpoint = Checkpoint.open(runner.info.path / ENGINE_CHECKPOINT)
    config = checkpoint.config.drafter
    assert config is not None
    drafter = load_drafter(checkpoint, config, torch.device("cpu"))
    executor = runner.executor
    assert isinstance(executor, NativeExecutor)
    shape = DraftShape(5, 3)
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(3, 64, generator=generator).to(torch.bfloat16)
    first = torch.tensor([4, 9, 33])
    for rows in (None, torch.arange(0, 64, 1)[:60]):
        native = NativeSearch(executor, drafter, rows, shape, max_batch_size=3).beams(context, first.tolist())
        embedding = checkpoint.load("transformer.vocab_embedding.weight")
        wide = copy.deepcopy(drafter).float()
        expected = beam_search(
            wide, embedding.float(), context.float(), first, shape, head=draft_head(wide, rows), keep_log_probs=False
        )
        same = (native.tokens == expected.tokens).float().mean()
        assert same > 0.9  # bf16 rounding may swap near-equal beams
        torch.testing.assert_close(native.path_scores, expected.path_scores, atol=0.1, rtol=0.02)


def test_without_compiler_pytorch_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path, "llama", **SIZES)
    engine = build_engine(checkpoint, tmp_path / "engine")
    native = load(engine).generate([Request(PROMPTS[0], SamplingParams(max_tokens=5))])[0]
    monkeypatch.setenv("REDRAFTER_NATIVE", "0")
    library.load_library.cache_clear()
    try:
        runner = load(engine)
        assert runner.executor.name == "pytorch"
        assert runner.info.device == "cpu (pytorch: REDRAFTER_NATIVE=0)"
        assert runner.generate([Request(PROMPTS[0], SamplingParams(max_tokens=5))])[0].token_ids == native.token_ids
    finally:
        library.load_library.cache_clear()


def test_the_portable_kernels_compute_the_same(
    runner: TorchRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines without AVX512-BF16 run the same source through plain C++."""
    prompt = list(range(3, 63))
    expected = runner.executor.prefill(0, prompt).logits
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DREDRAFTER_PORTABLE"))
    library.load_library.cache_clear()
    try:
        portable = load(runner.info.path)
        assert portable.executor.detail == "portable"
        logits = portable.executor.prefill(0, prompt).logits
        torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.05)
        sampling = SamplingParams(max_tokens=40, ignore_eos=True)
        both = portable.generate([Request(PROMPTS[0], sampling, draft=draft) for draft in (True, False)])
        assert both[0].token_ids == both[1].token_ids
    finally:
        library.load_library.cache_clear()


def test_a_low_rank_head_is_found_and_drafts_the_same(tmp_path: Path) -> None:
    """The trainer's tied head: base head times a factor, which the checkpoint holds multiplied out."""
    from trtllm_redrafter.backends.torch.low_rank import FACTOR_FILE, find_factor, load_factor

    folder = tmp_path / "tied"
    write_base(folder / "base", "llama", vocab_size=400, **SIZES)
    write_tied_drafter(folder / "drafter", hidden_size=64, exit_dim=128, vocab_size=400)
    checkpoint = convert_pair(folder)
    engine = build_engine(checkpoint, folder / "engine")
    assert (engine / FACTOR_FILE).exists()
    opened = Checkpoint.open(checkpoint)
    runner = load(engine)
    executor, config = runner.executor, opened.config.drafter
    assert isinstance(executor, NativeExecutor) and config is not None
    drafter = load_drafter(opened, config, torch.device("cpu"))
    context = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    low_rank = load_factor(engine, opened.load("lm_head.weight"))
    shape, first = DraftShape(3, 3), [5, 7]
    beams = [
        NativeSearch(executor, drafter, None, shape, max_batch_size=2, low_rank=head).beams(context, first)
        for head in (None, low_rank)
    ]
    assert (beams[0].tokens == beams[1].tokens).float().mean() > 0.8
    torch.testing.assert_close(beams[0].path_scores, beams[1].path_scores, atol=0.1, rtol=0.03)
    assert find_factor(Checkpoint.open(write_checkpoint(tmp_path / "free", "llama", **SIZES))) is None


def test_more_threads_than_there_are_places_for(
    runner: TorchRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 threads wrote behind an array of 256; bits do not depend on their number."""
    expected = runner.executor.prefill(0, PROMPTS[2])
    monkeypatch.setenv("REDRAFTER_THREADS", "300")
    many = load(runner.info.path)
    executor = many.executor
    assert isinstance(executor, NativeExecutor) and executor.library.redrafter_threads(executor.handle) == 300
    found = executor.prefill(0, PROMPTS[2])
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.hidden, expected.hidden)
    many.close()


def test_tensors_that_do_not_fit_the_config_are_refused(runner: TorchRunner) -> None:
    checkpoint = Checkpoint.open(runner.info.path / ENGINE_CHECKPOINT)
    weights = load_weights(checkpoint, torch.device("cpu"))
    for change in (
        {"intermediate_size": 128},
        {"num_key_value_heads": 4},
        {"vocab_size": 80},
        {"num_hidden_layers": 3},
    ):
        config = dataclasses.replace(checkpoint.config, **change)
        with pytest.raises(MismatchError, match=r"config\.json"):
            NativeExecutor(config, weights, max_batch_size=2, capacity=64, max_rows=8)


def test_what_would_leave_the_arrays_is_refused(runner: TorchRunner) -> None:
    """The C++ side checks every call; these would be bugs of ours."""
    executor = runner.executor
    assert isinstance(executor, NativeExecutor)
    root = [Tree.root(5)]
    for slots, bases, trees in (([4], [0], root), ([-1], [0], root), ([0], [10**6], root), ([0], [0], [Tree.root(64)])):
        with pytest.raises(ValueError, match="redrafter_forward: "):
            executor.forward(slots, bases, trees, logits=False)
    with pytest.raises(ValueError, match="redrafter_commit: a path does not rise"):
        executor.commit(0, 0, [0, 2, 1])
    with pytest.raises(ValueError, match="redrafter_clear: positions"):
        executor.clear(0, 0, 10**6)
    executor.prefill(0, PROMPTS[0])
