"""The torch backend on a CUDA device: the same tokens as on the CPU, with graphs, drafting and sampling.

Part of `make test-gpu`, but it needs a GPU and PyTorch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.backends.test_decoding_ahead import COUNTED, Followers, counted
from tests.backends.test_not_finite import damaged_engine
from tests.engines import VOCAB, build_engine, load, with_oracle, write_checkpoint, write_tokenizer
from tests.kernel_cases import SHAPES, attention_case, pointwise_case
from tests.tiny_models import FAMILIES
from trtllm_redrafter.backends.base import Request, Result, SamplingParams
from trtllm_redrafter.backends.torch.backend import TorchBackend
from trtllm_redrafter.backends.torch.captured import CapturedGraph
from trtllm_redrafter.backends.torch.cuda.executor import SWITCH, CudaExecutor
from trtllm_redrafter.backends.torch.cuda.steps import DeviceSteps
from trtllm_redrafter.backends.torch.cuda_graphs import GraphExecutor, GraphSearch
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.backends.torch.transformer import TorchExecutor
from trtllm_redrafter.backends.torch.weights import load_weights
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import NumericalError
from trtllm_redrafter.redrafter.beam_search import beam_search, draft_head
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.token_tree import Tree
from trtllm_redrafter.verify.gate import GateRequest, parity_gate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ((5, 9, 23, 7), (3,), (11, 60, 2, 44, 31, 17, 8, 9, 10))


@pytest.fixture
def hopper_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


def on_gpu(engine: Path, device: str = "cuda") -> TorchRunner:
    return TorchBackend().load(engine, device=device, verify_hashes=False)


def tokens(runner: TorchRunner, sampling: SamplingParams, *, draft: bool = True) -> list[list[int]]:
    return [r.token_ids for r in runner.generate([Request(p, sampling, draft=draft) for p in PROMPTS])]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_cpus(tmp_path: Path, family: str) -> None:
    engine = build_engine(write_checkpoint(tmp_path, family, tp_size=2), tmp_path / "engine")
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    expected = tokens(load(engine), sampling)
    runner = on_gpu(engine)
    assert isinstance(runner.executor, GraphExecutor)
    assert tokens(runner, sampling, draft=False) == expected
    assert tokens(runner, sampling) == expected
    truth = dict(zip(PROMPTS, expected, strict=True))
    results = with_oracle(runner, truth, DraftShape(4, 3)).generate([Request(p, sampling) for p in PROMPTS])
    assert [r.token_ids for r in results] == expected
    assert all(r.acceptance_length is not None and r.acceptance_length > 1.5 for r in results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_that_are_not_finite(tmp_path: Path, dtype: str) -> None:
    check_not_finite(tmp_path, dtype)


@pytest.mark.usefixtures("hopper_kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_that_are_not_finite_in_cuda_kernels(tmp_path: Path, dtype: str) -> None:
    check_not_finite(tmp_path, dtype, head_dim=64)


def check_not_finite(folder: Path, dtype: str, **sizes: int) -> None:
    """Inside graphs: a text with a broken token fails alone, a broken drafter changes no text."""
    sampling, broken = SamplingParams(max_tokens=30, ignore_eos=True), 23
    runner = on_gpu(damaged_engine(folder / "good", dtype, None, None, **sizes))
    assert isinstance(runner.executor, CudaExecutor if sizes else GraphExecutor)
    good = tokens(runner, sampling)
    nan = torch.tensor(float("nan"))
    base = on_gpu(
        damaged_engine(
            folder / "base", dtype, lambda t: t["model.embed_tokens.weight"].__setitem__(broken, nan), None, **sizes
        )
    )
    with pytest.raises(NumericalError, match="the logits after the prompt") as caught:
        tokens(base, sampling)
    whole = [broken not in (*prompt, *text[:-1]) for prompt, text in zip(PROMPTS, good, strict=True)]
    assert [r.error is None for r in caught.value.results if isinstance(r, Result)] == whole
    assert any(whole)
    drafter = on_gpu(
        damaged_engine(folder / "drafter", dtype, None, lambda t: t["rnn_u.bias"].__setitem__(0, nan), **sizes)
    )
    assert tokens(drafter, sampling) == good and drafter.drafter_error is not None


def test_graphs_of_many_batch_sizes_share_buffers(tmp_path: Path) -> None:
    """Too many rows to pad every pass to the largest batch: a graph per size, as requests end one by one."""
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine", max_batch_size=12)
    requests = [Request((3 + i, 9, 4), SamplingParams(4 + 3 * i, ignore_eos=True)) for i in range(12)]
    runner = on_gpu(engine)
    executor = runner.executor
    assert isinstance(executor, GraphExecutor) and not executor._limits.fixed_batch
    expected = [r.token_ids for r in load(engine).generate(requests)]
    for draft in (True, False, True):
        found = runner.generate([replace(request, draft=draft) for request in requests])
        assert [r.token_ids for r in found] == expected
    assert len(executor._captured) > 1
    runner.close()
    assert not executor._captured


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_gpu_is_used_as_the_first(tmp_path: Path, dtype: str) -> None:
    engine = build_engine(write_checkpoint(tmp_path, dtype=dtype, hidden_size=64), tmp_path / "engine")
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    torch.cuda.set_device(0)
    first, second = on_gpu(engine, "cuda:0"), on_gpu(engine, "cuda:1")
    before = torch.cuda.memory_allocated(0)
    assert tokens(second, sampling) == tokens(second, sampling, draft=False) == tokens(first, sampling)
    assert second.executor.device == "cuda:1" and torch.cuda.current_device() == 0
    assert torch.cuda.memory_allocated(0) - before < 2**20


def test_a_failed_capture_changes_nothing() -> None:
    """The stream is the caller's again, and the next capture works."""
    pool, device = torch.cuda.graph_pool_handle(), torch.device("cuda", torch.cuda.current_device())
    stream, calls = torch.cuda.current_stream(), []

    def fails() -> torch.Tensor:
        calls.append(0)
        if len(calls) > 2:  # two runs warm up
            raise KeyboardInterrupt
        return graph.input + 1

    graph = CapturedGraph(3, device)
    graph.fill([1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        graph.capture(fails, pool)
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    graph = CapturedGraph(3, device)
    graph.fill([1, 2, 3])
    doubled = graph.capture(lambda: graph.input * 2, pool)
    for values in ([4, 5, 6], [7, 8, 9]):
        graph.fill(values)
        graph.replay()
        assert doubled.tolist() == [2 * value for value in values]


def test_sampled_tokens_are_the_cpus(tmp_path: Path) -> None:
    engine = build_engine(write_checkpoint(tmp_path), tmp_path / "engine")
    sampling = SamplingParams(max_tokens=60, temperature=0.8, top_p=0.9, seed=11, ignore_eos=True)
    runner = on_gpu(engine)
    assert tokens(runner, sampling) == tokens(runner, sampling, draft=False) == tokens(load(engine), sampling)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_drafting_changes_no_16_bit_text(tmp_path: Path, family: str, dtype: str) -> None:
    """Bits of a row do not depend on the tree around it nor on the batch; heads of 16, groups of 2 and long texts."""
    checkpoint = write_checkpoint(
        tmp_path, family, dtype=dtype, hidden_size=64, max_position_embeddings=2048, num_attention_heads=4
    )
    runner = on_gpu(build_engine(checkpoint, tmp_path / "engine", max_input_len=1000, max_seq_len=1500))
    assert runner.executor.row_invariant
    long = [Request(tuple((7 * i) % VOCAB for i in range(480)), SamplingParams(80, ignore_eos=True), draft=False)]
    requests = [Request(p, SamplingParams(200, ignore_eos=True), draft=False) for p in PROMPTS] + long
    expected = [r.token_ids for r in runner.generate(requests)]
    alone = [runner.generate([request])[0].token_ids for request in requests]
    assert alone == expected
    truth = {r.token_ids: tokens for r, tokens in zip(requests, expected, strict=True)}
    drafted = [replace(request, draft=True) for request in requests]
    assert [r.token_ids for r in runner.generate(drafted)] == expected
    results = with_oracle(runner, truth, DraftShape(4, 3)).generate(drafted)
    assert [r.token_ids for r in results] == expected
    assert all(r.acceptance_length is not None and r.acceptance_length > 1.5 for r in results)
    faster = runner.autoregressive()
    assert faster is not runner and all(r.steps for r in faster.generate(requests))


@pytest.mark.usefixtures("hopper_kernels")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cuda_kernels_change_no_text_with_drafting(tmp_path: Path, family: str, dtype: str) -> None:
    """Heads of 64; prompts longer than a piece; trees and batches of all sizes: the same bits."""
    checkpoint = write_checkpoint(
        tmp_path, family, dtype=dtype, hidden_size=256, head_dim=64, num_attention_heads=4, max_position_embeddings=2048
    )
    runner = on_gpu(build_engine(checkpoint, tmp_path / "engine", max_input_len=1000, max_seq_len=1500))
    assert isinstance(runner.executor, CudaExecutor), runner.info.device
    long = [Request(tuple((7 * i) % VOCAB for i in range(480)), SamplingParams(80, ignore_eos=True), draft=False)]
    requests = [Request(p, SamplingParams(200, ignore_eos=True), draft=False) for p in PROMPTS] + long
    expected = [r.token_ids for r in runner.generate(requests)]
    assert [runner.generate([request])[0].token_ids for request in requests] == expected
    truth = {r.token_ids: tokens for r, tokens in zip(requests, expected, strict=True)}
    drafted = [replace(request, draft=True) for request in requests]
    assert [r.token_ids for r in runner.generate(drafted)] == expected
    results = with_oracle(runner, truth, DraftShape(4, 3)).generate(drafted)
    assert [r.token_ids for r in results] == expected
    assert all(r.acceptance_length is not None and r.acceptance_length > 1.5 for r in results)


class DeviceFollowers:
    """`Followers` on the device, in place of the search kernel; two sequences a launch."""

    largest = 2

    def __init__(self, host: Followers) -> None:
        self.shape = host.shape
        tables = [[known.get(token, 0) for token in range(VOCAB)] for known in (host.first, host.last)]
        self._tables = torch.tensor(tables, device="cuda")

    def __call__(self, contexts: torch.Tensor, roots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = [roots.unsqueeze(1).expand(-1, 2)]
        for _ in range(self.shape.draft_len):
            tokens.append(torch.stack([table[tokens[-1][:, i]] for i, table in enumerate(self._tables)], 1))
        beams = torch.stack(tokens, 2).contiguous()
        return beams, torch.zeros_like(beams, dtype=torch.float32)


@pytest.mark.usefixtures("hopper_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_on_the_device_are_those_of_the_host(tmp_path: Path, family: str) -> None:
    """Results and statistics of every request, for batches of all sizes, which end in all ways."""
    checkpoint = write_checkpoint(
        tmp_path, family, dtype="bfloat16", hidden_size=256, head_dim=64, num_attention_heads=4,
        max_position_embeddings=2048,
    )  # fmt: skip
    runner = on_gpu(build_engine(checkpoint, tmp_path / "engine", max_batch_size=5, max_seq_len=1500))
    assert isinstance(runner.executor, CudaExecutor) and runner._steps is not None
    greedy = SamplingParams(300, ignore_eos=True)
    texts = {
        p: r.token_ids for p, r in zip(PROMPTS, runner.generate([Request(p, greedy) for p in PROMPTS]), strict=True)
    }
    batch = [Request(p, SamplingParams(n, ignore_eos=True)) for p in PROMPTS for n in (1, 2, 7, 300)]
    batch += [Request(p, SamplingParams(90, ignore_eos=True, stop_token_ids=(t[40],))) for p, t in texts.items()]
    batch += [Request(p, greedy, draft=False) for p in PROMPTS]
    batch += [Request(p, SamplingParams(40, temperature=0.8, seed=1, ignore_eos=True)) for p in PROMPTS]
    host = Followers(list(texts.values()))
    found = []
    for steps in (None, DeviceSteps(runner.executor, DeviceFollowers(host), max_batch_size=5)):  # type: ignore[arg-type]
        runner._drafting, runner._steps = host, steps
        found.append(counted(runner.generate(batch)))
    assert found[0] == found[1]
    assert sum(row[COUNTED.index("accepted_tokens")] for row in found[1]) > 100  # type: ignore[misc]


@pytest.mark.usefixtures("hopper_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_kernels_are_as_near_to_float32_as_pytorch(tmp_path: Path, family: str) -> None:
    """Logits along a text, prompt and single steps: errors of 16-bit rounding, no more than PyTorch's own by a half."""
    found = {}
    for dtype, kind in (("float32", GraphExecutor), ("bfloat16", CudaExecutor), ("bfloat16", TorchExecutor)):
        folder = tmp_path / f"{dtype}-{kind.__name__}"
        checkpoint = write_checkpoint(folder, family, dtype=dtype, hidden_size=256, head_dim=64, num_attention_heads=4)
        runner = on_gpu(build_engine(checkpoint, folder / "engine"))
        executor = runner.executor
        if kind is TorchExecutor:
            opened = Checkpoint.open(checkpoint)
            executor = TorchExecutor(
                opened.config, load_weights(opened, torch.device("cuda")), max_batch_size=2, capacity=100
            )
        assert isinstance(executor, kind)
        text = [(11 * i) % VOCAB for i in range(40)]
        rows = [executor.prefill(0, text[:30]).logits]
        for place in range(30, 40):
            output = executor.forward([0], [place], [Tree.root(text[place])], logits=True)
            executor.commit(0, place, [0])
            assert output.logits is not None
            rows.append(output.logits[0])
        found[kind] = torch.stack(rows).float()
    truth = found[GraphExecutor]
    ours, theirs = ((found[k] - truth).norm() / truth.norm() for k in (CudaExecutor, TorchExecutor))
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_the_checkpoints(tmp_path: Path, dtype: str) -> None:
    """Every token is the reference's own choice or within rounding of it."""
    checkpoint = write_checkpoint(tmp_path, "qwen3", dtype=dtype, hidden_size=64, vocab_size=260)
    engine = build_engine(checkpoint, tmp_path / "engine", write_tokenizer(tmp_path / "tokenizer"))
    report = parity_gate(GateRequest(engine, checkpoint, ("abc", "d"), 64, None, "cuda"))
    assert not report.faults and report.same > 50, report.render()


def search_case(tie: bool) -> tuple[Drafter, torch.Tensor]:
    torch.manual_seed(3)
    drafter = Drafter(DrafterConfig(vocab_size=400, hidden_size=16, exit_dim=32, num_layers=2, rnn=True)).eval()
    if tie:  # every token as likely as every other: more than are looked at tie with the 50th
        with torch.no_grad():
            drafter.lm_head.weight.copy_(drafter.lm_head.weight[:1].expand_as(drafter.lm_head.weight))
    return drafter, torch.randn(400, 16)


@pytest.mark.parametrize("tie", [False, True])
def test_graphs_draft_what_the_search_does(tie: bool) -> None:
    drafter, embedding = search_case(tie)
    shape = DraftShape(4, 5)

    def expected(contexts: torch.Tensor, roots: Sequence[int]) -> list[list[list[int]]]:
        found: list[list[list[int]]] = beam_search(
            drafter, embedding, contexts, torch.tensor(roots), shape
        ).tokens.tolist()
        return found

    on_device = search_case(tie)[0].cuda()
    search = GraphSearch(on_device, embedding.cuda(), draft_head(on_device), shape, torch.cuda.graph_pool_handle())
    for seed, roots in enumerate([[5], [7], [3, 9, 11], [VOCAB, 2, 1]]):
        contexts = torch.randn(len(roots), 16, generator=torch.Generator().manual_seed(seed))
        assert search.search(list(contexts.cuda()), roots)[0] == expected(contexts, roots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "size", "bases", "normed"), SHAPES)
def test_attention_is_float32s(
    batch: int, heads: int, kv_heads: int, size: int, bases: list[int], normed: bool, dtype: torch.dtype
) -> None:
    found, expected = attention_case(batch, heads, kv_heads, size, bases, normed=normed, dtype=dtype, device="cuda")
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_fused_operations_are_pytorchs() -> None:
    assert pointwise_case("cuda") < 0.01


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 12 * 2**30, reason="needs 12 GiB of GPU memory"
)
def test_more_partial_sums_than_32_bits_count() -> None:
    """4,096 equal rows of 32 heads of 128, in room for 129 units each: 2^31 numbers and more."""
    from trtllm_redrafter.backends.torch.tree_attention import Heads, TreeRows, attend

    torch.manual_seed(4)
    count, capacity, sizes = 4096, 320, Heads(32, 8, 128, 1e-5)
    qkv = torch.randn(1, 48 * 128, device="cuda").bfloat16().expand(count, -1).contiguous()
    keys = torch.randn(1, 8, capacity, 128, device="cuda").bfloat16()
    rotary = torch.ones(capacity, 128, device="cuda").bfloat16(), torch.zeros(capacity, 128, device="cuda").bfloat16()
    zeros = torch.zeros(count, dtype=torch.int64, device="cuda")
    rows = TreeRows(zeros, zeros + 300, zeros.view(-1, 1), zeros.view(-1, 1, 1))
    found = attend(qkv, None, rotary, (keys, keys.clone()), rows, sizes, 129 * 256)
    few = TreeRows(rows.slots[:1], rows.bases[:1], rows.depths[:1], rows.paths[:1])
    expected = attend(qkv[:1], None, rotary, (keys, keys.clone()), few, sizes, capacity)
    assert torch.equal(found, expected.expand(count, -1))
