"""What surrounds CUDA graphs, on the CPU: sizes, packing, spans, padding, the search, errors.

A stand-in runs the function where a graph would be replayed, and writes into the same outputs. Streams, captures and
kernels are tested in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import build_engine, load, with_oracle, write_checkpoint
from tests.tiny_models import FAMILIES
from trtllm_redrafter.backends.base import Request, SamplingParams
from trtllm_redrafter.backends.torch import cuda_graphs
from trtllm_redrafter.backends.torch.backend import TorchBackend, _device
from trtllm_redrafter.backends.torch.cuda_graphs import GraphExecutor, GraphLimits, GraphSearch
from trtllm_redrafter.backends.torch.layout import Layout
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.backends.torch.transformer import TorchExecutor
from trtllm_redrafter.errors import BackendError, UsageError
from trtllm_redrafter.memory import memory_for
from trtllm_redrafter.redrafter.beam_search import beam_search, draft_head
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.token_tree import Tree

PROMPTS = ((5, 9, 23, 7), (3,), (11, 60, 2, 44, 31, 17, 8, 9, 10))


class Replayed:
    """A graph's interface: outputs are made once, every replay writes them anew."""

    captures = 0

    def __init__(self, size: int, device: torch.device) -> None:
        self.input = torch.zeros(size, dtype=torch.int64)

    def fill(self, values: Sequence[int]) -> None:
        assert len(values) == len(self.input)
        self.input.copy_(torch.tensor(values))

    def capture(self, function: Callable[[], Any], pool: Any) -> Any:
        type(self).captures += 1
        self._function, self._outputs = function, function()
        return self._outputs

    def replay(self) -> None:
        self._outputs.copy_(self._function())


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "CapturedGraph", Replayed)
    monkeypatch.setattr(cuda_graphs, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(Replayed, "captures", 0)


def graph_runner(folder: Path, family: str = "llama", *, drafter: bool = True, **limits: int) -> TorchRunner:
    """An engine of random weights on the graph executor."""
    return on_graphs(build_engine(write_checkpoint(folder, family, drafter=drafter), folder / "engine", **limits))


def on_graphs(engine: Path) -> TorchRunner:
    """An engine on the graph executor, as `TorchBackend.load` makes it for a GPU."""
    from trtllm_redrafter.backends.torch.drafting import load_drafter, make_search
    from trtllm_redrafter.checkpoint.reader import Checkpoint

    plain = load(engine)
    assert isinstance(plain.executor, TorchExecutor)
    shape, info = plain.info.draft_shape, plain.info
    nodes, depth = (1, 0) if shape is None else (shape.max_tree_tokens, shape.draft_len)
    sizes = GraphLimits(info.max_batch_size, info.max_seq_len + nodes, max_nodes=nodes, max_depth=depth)
    executor = GraphExecutor(plain.executor._config, plain.executor._weights, sizes, fused=False)
    drafting = None
    if shape is not None:
        checkpoint = Checkpoint.open(engine / "checkpoint")
        assert checkpoint.config.drafter is not None
        model = load_drafter(checkpoint, checkpoint.config.drafter, torch.device("cpu"))
        drafting = make_search(model, executor, plain.executor._weights.embedding, shape,
                            rows=None, max_batch_size=info.max_batch_size, low_rank=None)  # fmt: skip
    return TorchRunner(info, executor, drafting, None, frozenset())


def answers(runner: TorchRunner, count: int = 30, *, draft: bool = True) -> list[list[int]]:
    sampling = SamplingParams(count, ignore_eos=True)
    return [r.token_ids for r in runner.generate([Request(p, sampling, draft=draft) for p in PROMPTS])]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_passes_write_what_plain_ones_do(tmp_path: Path, family: str) -> None:
    runner = graph_runner(tmp_path, family)
    expected = answers(load(tmp_path / "engine"))
    assert answers(runner, draft=False) == answers(runner) == expected
    truth = dict(zip(PROMPTS, expected, strict=True))
    good = with_oracle(runner, truth, DraftShape(4, 3))
    assert answers(good) == expected
    fallback = with_oracle(runner, truth, DraftShape(4, 5))  # deeper than the graphs
    assert answers(fallback) == expected
    assert answers(runner.autoregressive()) == expected


def test_sampled_passes_too(tmp_path: Path) -> None:
    runner, plain = graph_runner(tmp_path), load(tmp_path / "engine")
    requests = [Request(p, SamplingParams(20, temperature=0.8, seed=7, ignore_eos=True)) for p in PROMPTS]
    assert [r.token_ids for r in runner.generate(requests)] == [r.token_ids for r in plain.generate(requests)]


@pytest.mark.parametrize("drafter", [True, False])
def test_the_last_positions_of_the_cache_are_used(tmp_path: Path, drafter: bool) -> None:
    """Prompt and answer fill the engine to its end, across a power of two."""
    runner = graph_runner(tmp_path, drafter=drafter, max_seq_len=256, max_input_len=250)
    prompt = tuple(3 + i % 50 for i in range(200))
    request = Request(prompt, SamplingParams(56, ignore_eos=True))
    [found], [expected] = runner.generate([request]), load(tmp_path / "engine").generate([request])
    assert found.token_ids == expected.token_ids and len(found.token_ids) == 56
    executor = runner.executor
    assert isinstance(executor, GraphExecutor)
    with pytest.raises(ValueError, match="the cache at"):
        executor.forward([0], [executor._capacity], [Tree.root(1)], logits=False)


def test_a_cancelled_request_leaves_the_others_and_its_place(tmp_path: Path) -> None:
    runner = graph_runner(tmp_path)
    expected = answers(load(tmp_path / "engine"))
    ids = [runner.submit(Request(p, SamplingParams(30, ignore_eos=True))) for p in PROMPTS]
    runner.step()
    assert runner.cancel(ids[0]) is not None
    runner.submit(Request(PROMPTS[0], SamplingParams(30, ignore_eos=True)))
    found = {}
    while runner.has_work:
        found |= {u.request_id: u.result.token_ids for u in runner.step() if u.result is not None}
    assert sorted(found.values()) == sorted(expected)


def test_states_and_logits_outlive_the_next_pass(tmp_path: Path) -> None:
    executor = graph_runner(tmp_path).executor
    assert isinstance(executor, GraphExecutor)
    executor.prefill(0, PROMPTS[0])
    one = executor.forward([0], [4], [Tree.root(5)], logits=True)
    assert one.logits is not None
    hidden, logits = one.hidden.clone(), one.logits.clone()
    executor.forward([0], [4], [Tree.root(9)], logits=True)
    assert torch.equal(one.hidden, hidden) and torch.equal(one.logits, logits) and Replayed.captures == 1


def test_close_lets_go_of_everything(tmp_path: Path) -> None:
    runner = graph_runner(tmp_path)
    answers(runner)
    runner.close()
    executor = runner.executor
    assert isinstance(executor, GraphExecutor)
    assert not executor._captured and not executor._keys.numel() and not executor._weights.layers
    assert not executor._logits.numel() and runner._drafting is None


@pytest.mark.parametrize(
    ("batch", "nodes", "width", "fixed"),
    [(1, 1, 1, True), (128, 1, 1, True), (129, 1, 1, False), (4, 26, 32, True), (5, 26, 32, False), (16, 8, 8, True)],
)
def test_limits(batch: int, nodes: int, width: int, fixed: bool) -> None:
    limits = GraphLimits(batch, 1000, max_nodes=nodes, max_depth=5)
    assert (limits.width, limits.fixed_batch) == (width, fixed)


@pytest.mark.parametrize(("base", "span"), [(0, 256), (240, 256), (241, 512), (496, 512), (497, 1024), (1008, 1024)])
def test_spans_hold_the_whole_tree(tmp_path: Path, base: int, span: int) -> None:
    """Trees are 16 nodes wide; the cache has 1,000 + 16 positions, rounded up to 1,024."""
    weights = load(build_engine(write_checkpoint(tmp_path), tmp_path / "engine")).executor
    assert isinstance(weights, TorchExecutor)
    limits = GraphLimits(1, 1000, max_nodes=13, max_depth=3)
    assert GraphExecutor(weights._config, weights._weights, limits, fused=False)._power_of_two(base) == span


def test_trees_are_packed_by_paths_and_padded_to_one_width() -> None:
    #                    g ── 5 ── 9
    #                    └─── 6
    tree = Tree([8, 5, 9, 6], [-1, 0, 1, 0], [0, 1, 2, 1])
    layout = Layout(rows=15, batch=3, nodes=5, path=3, padded=True)
    packed = torch.tensor(layout.pack([2, 0], [70, 9], [Tree.root(7), tree], spare=4))
    assert len(packed) == layout.size
    parts = {name: part.tolist() for name, part in layout.split(packed).items()}
    padding = [-1, -1, -1]
    assert parts == {
        "sequence": [0, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1],
        "depths": [0, 0, 0, 0, 0, 0, 1, 2, 1, 0, 0, 0, 0, 0, 0],
        "paths": [0, 0, 0, *padding * 4, 0, 0, 0, 0, 1, 1, 0, 1, 2, 0, 3, 3, *padding * 6],
        "slots": [2, 0, 4],
        "bases": [70, 9, 0],
        "first": [0, 5, 10, 10],
        "tokens": [7, 0, 0, 0, 0, 8, 5, 9, 6, 0, 0, 0, 0, 0, 0],
        "real": [0, 5, 6, 7, 8, *[0] * 10],
    }


@pytest.mark.parametrize("tie", [False, True])
def test_the_search_is_captured_per_batch_size(tie: bool) -> None:
    torch.manual_seed(3)
    drafter = Drafter(DrafterConfig(vocab_size=400, hidden_size=16, exit_dim=32, num_layers=2, rnn=True)).eval()
    if tie:  # every token as likely as every other: more than are looked at tie with the 50th
        with torch.no_grad():
            drafter.lm_head.weight.copy_(drafter.lm_head.weight[:1].expand_as(drafter.lm_head.weight))
    embedding, shape = torch.randn(400, 16), DraftShape(4, 5)
    search = GraphSearch(drafter, embedding, draft_head(drafter), shape, None)
    for roots in ([5], [7], [3, 9, 11], [64, 2, 1]):
        contexts = torch.randn(len(roots), 16)
        expected = beam_search(drafter, embedding, contexts, torch.tensor(roots), shape).tokens.tolist()
        assert search.search(list(contexts), roots) == (expected, [True] * len(roots))
    assert Replayed.captures == 2


def test_a_failed_capture_leaves_no_graph_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = graph_runner(tmp_path)

    def full(self: Replayed, function: Callable[[], Any], pool: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Replayed, "capture", full)
        runner.submit(Request(PROMPTS[0], SamplingParams(30, ignore_eos=True), request_id="a"))
        with pytest.raises(BackendError, match="not enough memory for a step of 1 requests"):
            runner.step()
    executor = runner.executor
    assert isinstance(executor, GraphExecutor) and not executor._captured
    [(_, result)] = [(u.request_id, u.result) for _ in range(60) for u in runner.step() if u.result is not None]
    assert result is not None and result.token_ids == answers(load(tmp_path / "engine"))[0]


def test_other_errors_are_not_called_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_for("x", remedy="y"):
        raise RuntimeError("shapes do not match")
    with pytest.raises(BackendError, match="not enough memory for x"), memory_for("x", remedy="y"):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a device"):
        _device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"no device 'cuda:2'\n  remedy: use one of: cuda:0, cuda:1"):
        _device("cuda:2")
    assert _device("cuda:1").index == 1


def test_the_engine_says_what_it_runs_on(tmp_path: Path) -> None:
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine")
    info = TorchBackend().load(engine, device="cpu", verify_hashes=False, draft_shape=DraftShape(2, 2)).info
    assert info.device.startswith("cpu (pytorch: ") and info.draft_shape == DraftShape(2, 2)
