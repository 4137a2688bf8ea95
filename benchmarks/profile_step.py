"""Where a decoding step's time goes, beside what the memory bus allows.

Times the parts of a step from outside (proposing, the base model's pass, drawing, accepting, text) over one greedy
answer, and the base model's pass for trees of 1 to 32 rows. The floor of a pass is bytes of weights / bandwidth.

    python benchmarks/profile_step.py --engine runs/smollm2-demo/engine --output benchmarks/results/profile_step.json
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_decode import count_weights, machine, measure_bandwidth, median, publish

from trtllm_redrafter.backends.base import Request, SamplingParams
from trtllm_redrafter.backends.torch.backend import TorchBackend
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.redrafter.token_tree import Tree

PARTS = {"propose": "_propose", "accept": "_accept", "text": "_emit"}


class Stopwatch:
    """Wraps methods of an object and collects how long each call took, in milliseconds."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = defaultdict(list)

    def wrap(self, owner: Any, method: str, label: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self.calls[label].append(1e3 * (time.perf_counter() - start))
            return result

        setattr(owner, method, timed)


def step_parts(runner: TorchRunner, prompt: tuple[int, ...], draft: bool) -> dict[str, float]:
    """Median milliseconds of each part of a step."""
    watch = Stopwatch()
    owners = [(runner, attribute, label) for label, attribute in PARTS.items()]
    owners += [(runner, "_decode", "step"), (runner.executor, "forward", "base_model")]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in owners]
    for owner, name, label in owners:
        watch.wrap(owner, name, label)
    runner.generate([Request(prompt, SamplingParams(128), draft=draft)])
    for owner, name, original in originals:
        setattr(owner, name, original)
    parts = {label: median(values) for label, values in watch.calls.items()}
    parts["rest"] = parts["step"] - sum(v for k, v in parts.items() if k not in ("step", "text"))
    return {k: round(v, 3) for k, v in parts.items()}


def pass_by_rows(runner: TorchRunner, prompt: tuple[int, ...]) -> dict[int, float]:
    """Median milliseconds of one base-model pass over a chain of n nodes behind the prompt."""
    runner.executor.prefill(0, prompt)
    times = {}
    for rows in (1, 2, 4, 7, 8, 12, 16, 24, 32):
        tree = Tree(list(range(10, 10 + rows)), list(range(-1, rows - 1)), list(range(rows)))
        found = []
        for _ in range(30):
            start = time.perf_counter()
            runner.executor.forward([0], [len(prompt)], [tree], logits=False)
            found.append(1e3 * (time.perf_counter() - start))
        times[rows] = round(median(found), 3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    runner = TorchBackend().load(options.engine, device="cpu", verify_hashes=False)
    prompt = runner.encode_prompt("What is the history of sleep?", chat=True)
    runner.generate([Request(prompt, SamplingParams(32))])
    config = json.loads((options.engine / "checkpoint" / "config.json").read_text())
    weights = count_weights(config)
    bandwidth = measure_bandwidth(2 * weights)
    report = {
        "what": "one decoding step at batch 1, milliseconds, medians",
        "command": " ".join(["python", "benchmarks/profile_step.py", *sys.argv[1:]]),
        "machine": machine(runner),
        "base_model_weights": weights,
        "bandwidth_gb_per_second": round(bandwidth / 1e9, 2),
        "floor_of_reading_the_weights": round(1e3 * 2 * weights / bandwidth, 3),
        "without_drafting": step_parts(runner, prompt, draft=False),
        "with_drafting": step_parts(runner, prompt, draft=True),
        "base_model_pass_by_rows": pass_by_rows(runner, prompt),
    }
    publish(report, options.output)


if __name__ == "__main__":
    main()
