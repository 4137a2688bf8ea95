"""Decoding on one Hopper GPU through the torch backend's CUDA kernels, random weights of real sizes, beside the roof.

Times do not depend on the weights' values, so no model is needed. Per size and batch: a plain step, verification of a
full tree and the drafter's search on the GPU (between events around replays of the graph), then whole steps of the
runner by the clock; prompts by the clock; undrafted throughput of a wide batch, prompts included. The roof is the bytes
of the weights over the rate at which the card sums a large tensor, measured in the same run.

    python -m benchmarks.gpu_decode --output benchmarks/results/gpu_decode.json
    python -m benchmarks.gpu_decode --sizes qwen2.5-1.5b --config path/to/config.json --exit-dim 1024
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_steps import full_tree, planned_config, random_weights, time_calls
from trtllm_redrafter.backends.base import EngineInfo, Request, Result, SamplingParams
from trtllm_redrafter.backends.torch.cuda.executor import CudaExecutor
from trtllm_redrafter.backends.torch.cuda.search import SearchKernel
from trtllm_redrafter.backends.torch.cuda.steps import DeviceSteps
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.checkpoint.config import CheckpointConfig, read_checkpoint_config
from trtllm_redrafter.redrafter.beam_search import draft_head
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.token_tree import Tree

SHAPE = DraftShape(5, 5)
HEAD_ROWS = 32_768
SIZES: dict[str, tuple[dict[str, int], int, int]] = {  # fields, exit_dim of the drafter, committed positions
    "smollm2-135m": (
        {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
         "num_key_value_heads": 3, "head_size": 64, "vocab_size": 49152}, 576, 512,
    ),
    "qwen2.5-1.5b": (
        {"num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
         "num_key_value_heads": 2, "head_size": 128, "vocab_size": 151936}, 768, 512,
    ),
    "llama-3.1-8b": ({}, 1024, 1024),
}  # fmt: skip


def sized(name: str) -> CheckpointConfig:
    config, _ = planned_config("llama-3.1-8b")
    return replace(config, drafter=None, **SIZES[name][0])  # type: ignore[arg-type]


def read_rate() -> float:
    """Bytes per second of summing 4 GiB."""
    junk = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return junk.numel() * 4 / time_calls(junk.sum)[0] * 1e3


def random_search(config: CheckpointConfig, embedding: torch.Tensor, exit_dim: int, batch: int) -> SearchKernel:
    rows = min(HEAD_ROWS, config.vocab_size)
    with torch.device("meta"):
        drafter = Drafter(DrafterConfig(config.vocab_size, config.hidden_size, exit_dim, num_layers=2))
    drafter = drafter.to(embedding.dtype).to_empty(device="cuda")
    for parameter in drafter.parameters():
        nn.init.uniform_(parameter, -0.02, 0.02)
    head = draft_head(drafter.requires_grad_(False).eval(), torch.arange(rows, device="cuda"))
    return SearchKernel(drafter, embedding, head, SHAPE, max_batch_size=batch)


def make_runner(config: CheckpointConfig, exit_dim: int, batch: int, length: int) -> TorchRunner:
    weights = random_weights(config)
    nodes = SHAPE.max_tree_tokens
    executor = CudaExecutor(config, weights, max_batch_size=batch, capacity=length + nodes, max_nodes=nodes)
    search = random_search(config, weights.embedding, exit_dim, batch) if exit_dim else None
    info = EngineInfo(
        path=Path("random"), backend="torch", device="cuda", dtype=config.dtype, vocab_size=config.vocab_size,
        max_batch_size=batch, max_input_len=length - 1, max_seq_len=length, draft_shape=SHAPE if search else None,
    )  # fmt: skip
    return TorchRunner(
        info, executor, search, None, frozenset(), steps=DeviceSteps(executor, search, max_batch_size=batch)
    )


def prompt(config: CheckpointConfig, length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(config.vocab_size, (length,), generator=generator).tolist())


def clock(call: Callable[[], object], rounds: int = 7) -> float:
    """Milliseconds, the median."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def measure_steps(config: CheckpointConfig, exit_dim: int, context: int, batch: int) -> dict[str, Any]:
    runner = make_runner(config, exit_dim, batch, context + 256)
    executor, search = runner.executor, runner._drafting
    assert isinstance(executor, CudaExecutor) and isinstance(search, SearchKernel)
    row: dict[str, Any] = {"batch": batch}
    for name, tree in (("plain", Tree.root(1)), ("verify", full_tree(SHAPE.num_beams, SHAPE.draft_len))):
        executor._graphs.clear()
        executor.forward(list(range(batch)), [context] * batch, [tree] * batch, logits=False)
        row[f"{name}_ms"] = time_calls(next(iter(executor._graphs.values())).replay)[0]
    count = min(batch, search.largest)
    contexts = torch.zeros(count, config.hidden_size, dtype=executor.model.hidden.dtype, device="cuda")
    roots = torch.ones(count, dtype=torch.int64, device="cuda")
    search(contexts, roots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        search(contexts, roots)
    row["search_ms"] = time_calls(graph.replay)[0] * -(-batch // count)
    for name, draft in (("plain", False), ("drafted", True)):
        requests = [
            Request(prompt(config, context, i), SamplingParams(120, ignore_eos=True), draft=draft) for i in range(batch)
        ]
        runner.generate(requests)  # compiles and captures
        results = [result for _ in range(3) for result in runner.generate(requests)]
        row[f"{name}_clock_ms"] = 1e3 * statistics.median(r.decode_seconds / r.steps for r in results)
    row["break_even"] = row["drafted_clock_ms"] / row["plain_clock_ms"]
    runner.close()
    return row


def measure_prompts(config: CheckpointConfig, lengths: list[int]) -> list[dict[str, float]]:
    runner = make_runner(config, 0, 1, max(lengths) + 64)
    found = []
    for length in lengths:
        tokens = prompt(config, length)
        runner.executor.prefill(0, tokens)
        found.append({"tokens": length, "ms": clock(lambda tokens=tokens: runner.executor.prefill(0, tokens))})  # type: ignore[misc]
    runner.close()
    return found


def measure_throughput(config: CheckpointConfig, batch: int = 128, tokens: int = 128) -> dict[str, float]:
    runner = make_runner(config, 0, batch, 512)
    requests = [
        Request(prompt(config, 100 + i % 37, i), SamplingParams(tokens, ignore_eos=True)) for i in range(3 * batch)
    ]
    runner.generate(requests[:batch])
    start = time.perf_counter()
    results: list[Result] = runner.generate(requests)
    seconds = time.perf_counter() - start
    runner.close()
    return {"batch": batch, "requests": len(results), "tokens_per_second": len(results) * tokens / seconds}


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    rate = read_rate()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": date.today().isoformat(),
        "read_bytes_per_second": rate, "draft": [SHAPE.num_beams, SHAPE.draft_len], "head_rows": HEAD_ROWS,
        "models": {},
    }  # fmt: skip
    models = {name: (sized(name), *SIZES[name][1:]) for name in args.sizes.split(",") if name}
    if args.config is not None:
        given = replace(read_checkpoint_config(args.config), drafter=None)
        models[args.config.parent.name] = (given, args.exit_dim or given.hidden_size // 2, args.context)
    for name, (config, exit_dim, context) in models.items():
        weights = random_weights(config)
        streamed = sum(t.nbytes for layer in weights.layers for t in vars(layer).values() if t is not None)
        streamed += weights.head.nbytes
        del weights
        rows = []
        for batch in [int(b) for b in args.batches.split(",")]:
            rows.append(measure_steps(config, exit_dim, context, batch))
            print(name, json.dumps(rows[-1]), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        model: dict[str, Any] = {
            "exit_dim": exit_dim, "context": context, "streamed_bytes": streamed, "roof_ms": 1e3 * streamed / rate,
            "steps": rows,
        }  # fmt: skip
        model["share_of_roof"] = model["roof_ms"] / rows[0]["plain_ms"]
        if not args.steps_only:
            model["prompts"] = measure_prompts(config, [150, 512, 4096])
            model["throughput"] = measure_throughput(config)
        print(name, json.dumps({k: v for k, v in model.items() if k != "steps"}), flush=True)
        report["models"][name] = model
        gc.collect()
        torch.cuda.empty_cache()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="of the table in this file, with commas between")
    parser.add_argument("--config", type=Path, help="config.json of a checkpoint: its base model as well")
    parser.add_argument(
        "--exit-dim", type=int, help="of the random drafter for --config; default: half the hidden size"
    )
    parser.add_argument("--context", type=int, default=512, help="committed positions for --config")
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--steps-only", action="store_true", help="no prompts, no throughput")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report = measure_all(args)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
