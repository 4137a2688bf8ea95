"""How often drafting changes greedy output on the PyTorch executor in bfloat16.

There a row's last bits may depend on how many rows are computed beside it, so two nearly equal logits can change
places between drafting and autoregression. The compiled kernels do not have this; they are counted too, as a check.

    python benchmarks/count_ties.py --engine runs/smollm2-demo/engine --output benchmarks/results/ties.json
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench_decode import machine, publish

from trtllm_redrafter.backends.base import Request, SamplingParams
from trtllm_redrafter.backends.torch.backend import TorchBackend
from trtllm_redrafter.backends.torch.native import library


def differences(engine: Path, prompts: list[str], count: int) -> dict[str, Any]:
    """Prompts whose drafted text differs from the plain one, and how many tokens were equal before that."""
    runner = TorchBackend().load(engine, device="cpu", verify_hashes=False)
    found, tokens = [], 0
    for number, text in enumerate(prompts):
        prompt = runner.encode_prompt(text, chat=True)
        plain, drafted = (
            runner.generate([Request(prompt, SamplingParams(count), draft=draft)])[0].token_ids
            for draft in (False, True)
        )
        tokens += len(plain)
        if plain != drafted:
            same = next((i for i, (a, b) in enumerate(zip(plain, drafted, strict=False)) if a != b), 0)
            found.append({"prompt": number, "equal_tokens_before": same})
    result = {"machine": machine(runner), "tokens": tokens, "texts_that_differ": len(found), "where": found}
    runner.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=Path("scripts/data/eval_prompts.jsonl"))
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = options.prompts.read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:: max(1, len(lines) // options.count)]][: options.count]
    report: dict[str, Any] = {"command": " ".join(["python", "benchmarks/count_ties.py", *sys.argv[1:]])}
    report |= {"prompts": len(prompts), "max_tokens": options.max_tokens}
    report["native"] = differences(options.engine, prompts, options.max_tokens)
    os.environ["REDRAFTER_NATIVE"] = "0"
    library.load_library.cache_clear()
    report["pytorch"] = differences(options.engine, prompts, options.max_tokens)
    publish(report, options.output)


if __name__ == "__main__":
    main()
