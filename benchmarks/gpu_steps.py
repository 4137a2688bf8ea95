"""Step times of real model sizes on one GPU, torch backend with random weights, beside what `plan` says of it.

A step's time does not depend on the weights' values, so no model is needed: plain decoding, verification of a full
tree and the drafter's search are timed for each recipe of configs/ that fits one GPU in 16 bits, and the latency plan
is asked for the same sizes, batch and context. GPU times are between CUDA events around many replays of the graph in a
row; wall times add Python and the copies a step waits for.

    python benchmarks/gpu_steps.py --gpu h200 --recipes vicuna-7b,llama-3.1-8b --output results/gpu_steps.json
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from trtllm_redrafter.backends.torch.cuda_graphs import GraphExecutor, GraphLimits, GraphSearch
from trtllm_redrafter.backends.torch.weights import DTYPES, LayerWeights, ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.planning.gpus import gpu
from trtllm_redrafter.planning.latency import Assumptions, estimate_latency
from trtllm_redrafter.planning.memory import base_parameters, weight_bytes
from trtllm_redrafter.redrafter.beam_search import draft_head
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.redrafter.token_tree import Tree
from trtllm_redrafter.run.hardware_plan import recipe_model
from trtllm_redrafter.run.options import with_directories
from trtllm_redrafter.settings.layers import resolve
from trtllm_redrafter.settings.sources import file_layers

STEPS = 30
ROUNDS = 5
ROWS = (1, 8, 16, 32, 64, 128, 192, 256, 384, 512)


def random_weights(config: CheckpointConfig) -> ModelWeights:
    dtype = DTYPES[config.dtype]

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda").uniform_(-0.02, 0.02)

    h, inter, d = config.hidden_size, config.intermediate_size, config.head_size
    wide, heads = config.num_attention_heads * d, config.num_attention_heads + 2 * config.num_key_value_heads
    has_bias, has_norm = config.base_architecture.startswith("Qwen2"), config.base_architecture.startswith("Qwen3")
    layers = tuple(
        LayerWeights(
            input_norm=make(h), qkv=make(heads * d, h), qkv_bias=make(heads * d) if has_bias else None,
            q_norm=make(d) if has_norm else None, k_norm=make(d) if has_norm else None,
            dense=make(h, wide), dense_bias=None, post_norm=make(h),
            gate_proj=make(inter, h), gate_proj_bias=None, up_proj=make(inter, h), up_proj_bias=None,
            down_proj=make(h, inter), down_proj_bias=None,
        )
        for _ in range(config.num_hidden_layers)
    )  # fmt: skip
    return ModelWeights(make(config.vocab_size, h), layers, make(h), make(config.vocab_size, h))


def random_drafter(config: CheckpointConfig) -> Drafter:
    assert config.drafter is not None
    with torch.device("meta"):
        drafter = Drafter(config.drafter)
    drafter = drafter.to(DTYPES[config.dtype]).to_empty(device="cuda")
    for parameter in drafter.parameters():
        nn.init.uniform_(parameter, -0.02, 0.02)
        parameter.requires_grad_(False)
    return drafter.eval()


def full_tree(num_beams: int, draft_len: int) -> Tree:
    """Beams that share nothing: the largest tree a step can meet."""
    return Tree.merge([[1, *(2 + beam * draft_len + i for i in range(draft_len))] for beam in range(num_beams)])


def time_calls(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of one call: on the GPU and by the clock; medians of rounds."""
    call()
    on_gpu, by_clock = [], []
    for _ in range(ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        first.record()
        for _ in range(STEPS):
            call()
        last.record()
        torch.cuda.synchronize()
        by_clock.append(1e3 * (time.perf_counter() - start) / STEPS)
        on_gpu.append(first.elapsed_time(last) / STEPS)
    return statistics.median(on_gpu), statistics.median(by_clock)


def base_step(executor: GraphExecutor, slots: list[int], bases: list[int], trees: list[Tree]) -> list[int]:
    """One pass with its results on the host, as a runner needs them."""
    found: list[int] = executor.forward(slots, bases, trees, logits=False).best.tolist()
    return found


def replay_only(executor: GraphExecutor) -> Callable[[], object]:
    """The graph captured last, again and again: GPU time without what the host does between."""
    graph = list(executor._captured.values())[-1][0]
    return graph.replay


def measure(config: CheckpointConfig, context: int, batches: list[int]) -> list[dict[str, Any]]:
    shape = config.draft_shape
    assert shape is not None
    weights, drafter = random_weights(config), random_drafter(config)
    capacity = context + 2 * shape.max_tree_tokens
    rows: list[dict[str, Any]] = []
    for batch in batches:
        slots, bases = list(range(batch)), [context] * batch
        row: dict[str, Any] = {"batch": batch}
        drafting = GraphLimits(batch, capacity, max_nodes=shape.max_tree_tokens, max_depth=shape.draft_len)
        for name, limits, tree in (
            ("plain", GraphLimits(batch, capacity, max_nodes=1, max_depth=0), Tree.root(1)),
            ("plain_padded", drafting, Tree.root(1)),
            ("verify", drafting, full_tree(shape.num_beams, shape.draft_len)),
        ):
            executor = GraphExecutor(config, weights, limits, fused=True)
            trees = [tree] * batch
            executor.forward(slots, bases, trees, logits=False)
            row[f"{name}_ms"] = time_calls(replay_only(executor))[0]

            step = partial(base_step, executor, slots, bases, trees)
            row[f"{name}_wall_ms"] = time_calls(step)[1]
            executor.close()
        search = GraphSearch(drafter, weights.embedding, draft_head(drafter), shape, torch.cuda.graph_pool_handle())
        contexts = [torch.randn(config.hidden_size, dtype=weights.embedding.dtype, device="cuda") for _ in slots]
        search.search(contexts, [1] * batch)
        row["draft_ms"] = time_calls(search._captured[batch][0].replay)[0]
        row["draft_wall_ms"] = time_calls(partial(search.search, contexts, [1] * batch))[1]
        del search, executor
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def measure_products(config: CheckpointConfig) -> list[dict[str, float]]:
    """Milliseconds of a pass's matrix products alone, by rows: what `plan` calls reading and computing."""
    weights = random_weights(config)
    found = []
    for rows in ROWS:
        inputs = {n: torch.randn(rows, n, device="cuda", dtype=weights.head.dtype) for n in _widths(config)}
        matrices = [m for layer in weights.layers for m in (layer.qkv, layer.dense, layer.gate_proj, layer.up_proj)]
        matrices += [layer.down_proj for layer in weights.layers] + [weights.head]

        def run(inputs: dict[int, torch.Tensor] = inputs, matrices: list[torch.Tensor] = matrices) -> None:
            for matrix in matrices:
                F.linear(inputs[matrix.shape[1]], matrix)

        for _ in range(2):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        found.append({"rows": rows, "ms": time_calls(graph.replay)[0]})
    return found


def _widths(config: CheckpointConfig) -> set[int]:
    return {config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_size}


def planned_config(name: str) -> tuple[CheckpointConfig, Any]:
    """A recipe's model on one GPU, and its `plan` section."""
    resolved = with_directories(resolve(file_layers(Path("configs") / f"{name}.yaml")), name=name)
    return replace(recipe_model(resolved).config, tp_size=1), resolved.recipe.plan


def add_plan(report: dict[str, Any]) -> None:
    """What the plan of today says of each measured row; needs no GPU."""
    target, context = gpu(report["plan_of"]), report["context"]
    for name, model in report["models"].items():
        config, plan = planned_config(name)
        assumptions = Assumptions(context, plan.bandwidth_efficiency, plan.compute_efficiency, plan.kernel_us)
        for row in model["rows"]:
            planned = estimate_latency(config, target, assumptions, max_batch_size=row["batch"], acceptance_length=None)
            row["planned"] = {**asdict(planned.rows[-1]), "break_even": planned.rows[-1].break_even}
            row["break_even"] = (row["verify_ms"] + row["draft_ms"]) / row["plain_ms"]
            row["break_even_wall"] = (row["verify_wall_ms"] + row["draft_wall_ms"]) / row["plain_wall_ms"]
        reading = weight_bytes(config).base / (target.bandwidth * plan.bandwidth_efficiency)
        for row in model.get("products", []):
            rate = target.flops(fp8=False) * plan.compute_efficiency
            computing = 2 * row["rows"] * base_parameters(config) / rate
            row["planned_ms"] = 1e3 * math.hypot(reading, computing)


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "plan_of": args.gpu, "torch": torch.__version__,
        "context": args.context, "models": {},
    }  # fmt: skip
    for name in args.recipes.split(","):
        config, _ = planned_config(name)
        shape, sizes = config.draft_shape, weight_bytes(config)
        assert shape is not None
        report["models"][name] = {
            "draft": [shape.num_beams, shape.draft_len],
            "streamed_bytes": sizes.base,
            "drafter_bytes": sizes.drafter,
            "rows": measure(config, args.context, [int(b) for b in args.batches.split(",")]) if args.batches else [],
            "products": measure_products(config),
        }
        gc.collect()
        torch.cuda.empty_cache()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h200", help="row of the planning table that this GPU is")
    parser.add_argument("--recipes", default="vicuna-7b,llama-3.1-8b,mistral-7b,qwen3-8b")
    parser.add_argument("--batches", default="1,2,4,8", help="empty: matrix products only")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--again", type=Path, help="an earlier result: measure nothing, compare it with the plan anew")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report = measure_all(args) if args.again is None else json.loads(args.again.read_text())
    add_plan(report)
    text = json.dumps(report, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
