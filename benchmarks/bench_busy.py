"""Decoding beside a second process that keeps one core busy: how much is lost.

On two cores, perfect sharing would leave three quarters of the machine, and memory bandwidth is shared besides. What is
guarded against is far worse: threads that spin at a barrier while the one they wait for is not running.

    python benchmarks/bench_busy.py --engine runs/smollm2-demo/engine --output benchmarks/results/busy.json
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_decode import decode, machine, median, publish

from trtllm_redrafter.backends.torch.backend import TorchBackend

BUSY = "while True: sum(i * i for i in range(10000))"
ROUNDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    runner = TorchBackend().load(options.engine, device="cpu", verify_hashes=False)
    prompt = runner.encode_prompt("What is the history of sleep?", chat=True)
    decode(runner, prompt, options.max_tokens, True)
    speeds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, busy in (("alone", False), ("beside a busy process", True)):
            other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
            try:
                for draft in (False, True):
                    run = decode(runner, prompt, options.max_tokens, draft)
                    kind = "with drafting" if draft else "without drafting"
                    speeds.setdefault(f"{kind}, {name}", []).append(run["tokens"] / run["seconds"])
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
    medians = {name: round(median(values), 1) for name, values in speeds.items()}
    report: dict[str, Any] = {
        "what": "greedy decoding at batch 1, tokens per second, medians of alternating runs",
        "command": " ".join(["python", "benchmarks/bench_busy.py", *sys.argv[1:]]),
        "machine": machine(runner),
        "rounds": ROUNDS,
        "tokens_per_second": medians,
        "slowdown": {
            kind: round(medians[f"{kind}, alone"] / medians[f"{kind}, beside a busy process"], 2)
            for kind in ("without drafting", "with drafting")
        },
    }
    publish(report, options.output)


if __name__ == "__main__":
    main()
