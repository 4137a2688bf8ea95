"""Decoding speed at batch 1: this backend with and without drafting, beside transformers' generate.

All variants decode the same prompts greedily in one process, interleaved prompt by prompt, so that a change of the
machine's speed meets all of them. Speeds are tokens after the first over decoding time. The roof of a variant that
emits one token per step is memory bandwidth / bytes of weights; bandwidth is measured here too, by summing a buffer of
that size with all cores.

    python benchmarks/bench_decode.py --engine runs/engine --base .cache/smollm2-135m-instruct --output results.json
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trtllm_redrafter.backends.base import Request, SamplingParams
from trtllm_redrafter.backends.torch.backend import TorchBackend
from trtllm_redrafter.backends.torch.native.library import usable_cores
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.base_models.transformers_model import generate, load_model
from trtllm_redrafter.redrafter.config import DraftShape


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def measure_bandwidth(size: int) -> float:
    """Bytes per second of reading `size` bytes with all cores; the best of ten."""
    torch.set_num_threads(usable_cores())
    buffer = torch.ones(size // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def count_weights(config: dict[str, Any]) -> int:
    """Weights one step of the base model reads: its layers and one vocabulary matrix."""
    h, inter, d = config["hidden_size"], config["intermediate_size"], config["head_size"]
    heads = config["num_attention_heads"] * 2 + config["num_key_value_heads"] * 2
    per_layer: int = heads * d * h + 3 * inter * h
    return int(config["num_hidden_layers"]) * per_layer + int(config["vocab_size"]) * int(h)


def machine(runner: TorchRunner) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": runner.info.device,
    }


def decode(runner: TorchRunner, prompt: tuple[int, ...], count: int, draft: bool) -> dict[str, Any]:
    result = runner.generate([Request(prompt, SamplingParams(count), draft=draft)])[0]
    return {
        "tokens": len(result.token_ids) - 1,
        "seconds": result.decode_seconds,
        "steps": result.steps,
        "ids": result.token_ids,
    }


class Transformers:
    """transformers' own greedy generate on the same prompts, timed without its prefill."""

    def __init__(self, base: Path, eos: tuple[int, ...]) -> None:
        self._model = load_model(base, dtype=torch.bfloat16)
        self._eos = eos

    def decode(self, prompt: tuple[int, ...], count: int) -> dict[str, Any]:
        torch.set_num_threads(usable_cores())
        ids = torch.tensor([prompt])
        times = []
        for limit in (1, count):
            start = time.perf_counter()
            out = generate(self._model, ids, max_new_tokens=limit, eos=self._eos)
            times.append(time.perf_counter() - start)
        tokens = out.shape[1] - len(prompt) - 1
        return {
            "tokens": tokens,
            "seconds": times[1] - times[0],
            "steps": tokens,
            "ids": out[0, len(prompt) :].tolist(),
        }


def publish(report: dict[str, Any], output: Path | None) -> None:
    """Print a result, and keep it where it was asked for."""
    text = json.dumps(report, indent=1)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    print(text)


def summarise(runs: list[dict[str, Any]], baseline: list[dict[str, Any]], roof: float) -> dict[str, Any]:
    tokens, seconds, steps = (sum(r[k] for r in runs) for k in ("tokens", "seconds", "steps"))
    ratios = [
        (r["tokens"] / r["seconds"]) / (b["tokens"] / b["seconds"])
        for r, b in zip(runs, baseline, strict=True)
        if r["tokens"] and b["tokens"]
    ]
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_step": tokens / steps,
        "milliseconds_per_step": 1e3 * seconds / steps,
        "share_of_one_token_roof": tokens / seconds / roof,
        "speedup_over_autoregression": sum(b["seconds"] for b in baseline)
        / sum(b["tokens"] for b in baseline)
        * tokens
        / seconds,
        "speedup_median_of_prompts": median(ratios),
        "same_tokens_as_autoregression": sum(r["ids"] == b["ids"] for r, b in zip(runs, baseline, strict=True)),
        "prompts": len(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="Hugging Face directory for transformers; left out without it")
    parser.add_argument("--prompts", type=Path, default=Path("scripts/data/eval_prompts.jsonl"))
    parser.add_argument("--count", type=int, default=16, help="how many of the prompts")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", default="1x3,2x3,3x3,4x4,5x5")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    shapes = [DraftShape(*(int(n) for n in s.split("x"))) for s in options.shapes.split(",")]
    backend = TorchBackend()
    runners = {s.name: backend.load(options.engine, device="cpu", verify_hashes=False, draft_shape=s) for s in shapes}
    first = next(iter(runners.values()))
    lines = options.prompts.read_text().splitlines()
    step = max(1, len(lines) // options.count)
    prompts = [first.encode_prompt(json.loads(line)["prompt"], chat=True) for line in lines[::step][: options.count]]
    reference = Transformers(options.base, tuple(sorted(first._eos))) if options.base else None
    weight_bytes = 2 * count_weights(json.loads((options.engine / "checkpoint" / "config.json").read_text()))
    bandwidth = measure_bandwidth(weight_bytes)
    roof = bandwidth / weight_bytes

    runs: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(options.repeats + 1):
        for number, prompt in enumerate(prompts):
            if repeat == 0 and number > 1:
                break  # two prompts warm everything up and are not counted
            found = {"autoregression": decode(first, prompt, options.max_tokens, False)}
            if reference and repeat <= 1:
                found["transformers"] = reference.decode(prompt, options.max_tokens)
            for name, runner in runners.items():
                found[name] = decode(runner, prompt, options.max_tokens, True)
            for name, run in found.items():
                if repeat:
                    runs.setdefault(name, []).append(run)
            print(f"repeat {repeat} prompt {number}", file=sys.stderr, end="\r")
    baseline = runs["autoregression"]
    report = {
        "what": "greedy decoding at batch 1, bfloat16",
        "command": " ".join(["python", "benchmarks/bench_decode.py", *sys.argv[1:]]),
        "machine": machine(first),
        "weight_bytes": weight_bytes,
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "roof_tokens_per_second": roof,
        "max_tokens": options.max_tokens,
        "repeats": options.repeats,
        "variants": {name: summarise(r, baseline[: len(r)], roof) for name, r in runs.items()},
    }
    publish(report, options.output)


if __name__ == "__main__":
    main()
