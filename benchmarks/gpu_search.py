"""The drafter's search on a Hopper GPU: one kernel against PyTorch in a CUDA graph.

Random weights, several searches in one graph, the median of replays between events. "cold" writes 100 MB before each
search, as the base model's pass does, and takes that time off again. The floor is the weights' bytes over bandwidth.

    python benchmarks/gpu_search.py --hidden 1536 --exit 768 --rows 32768 --batch 1 4 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.cuda.search import SearchKernel
from trtllm_redrafter.redrafter.beam_search import beam_search, draft_head
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter

SEARCHES, REPLAYS = 10, 15


def replay_time(function: Callable[[], Any]) -> float:
    """Microseconds per call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(SEARCHES):
            function()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / SEARCHES)
    return sorted(times)[REPLAYS // 2]


def report(name: str, function: Callable[[], Any], junk: Tensor) -> None:
    def after_a_flush() -> None:
        junk.add_(1)
        function()

    cold = replay_time(after_a_flush) - replay_time(lambda: junk.add_(1))
    print(f"{name:28s} {replay_time(function):8.1f} us, cold {cold:8.1f} us", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 1536, "exit": 768, "layers": 2, "rows": 32768, "beams": 5, "length": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    torch.manual_seed(0)
    config = DrafterConfig(args.rows + 1024, args.hidden, args.exit, args.layers)
    shape = DraftShape(args.beams, args.length)
    drafter = Drafter(config).to("cuda", torch.bfloat16)
    embedding = torch.randn(config.vocab_size, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    head = draft_head(drafter, torch.randperm(config.vocab_size)[: args.rows])
    reason = SearchKernel.unsupported(drafter, embedding, head, shape)
    if reason:
        raise SystemExit(f"the kernel cannot do this: {reason}")
    junk = torch.zeros(100 << 20, dtype=torch.uint8, device="cuda")
    print(torch.cuda.get_device_name())
    for batch in args.batch:
        context = torch.randn(batch, config.hidden_size, device="cuda", dtype=torch.bfloat16)
        roots = torch.randint(config.vocab_size, (batch,), device="cuda")
        search = SearchKernel(drafter, embedding, head, shape, max_batch_size=batch)
        if search.largest < batch:
            print(f"batch {batch}: more than one launch takes ({search.largest})")
            continue
        report(f"batch {batch}, kernel", partial(search, context, roots), junk)
        pytorch = partial(beam_search, drafter, embedding, context, roots, shape, head=head, missed_ties=[])
        report(f"batch {batch}, PyTorch", pytorch, junk)


if __name__ == "__main__":
    main()
