"""Convert, build and generate with SmolLM2-135M through the Python API: streaming, sampling, statistics.

What it shows:

- `convert` and `build` are two function calls; the engine they make is a directory.
- `Engine.stream` yields text as it is written; the last update has the request's statistics.
- `Engine.generate` answers several prompts as one batch, each call with its own sampling parameters.
- Drafting changes the speed and not the text: the same request with and without the drafter.

Run `make demo` once (it fetches the model into `.cache/`), then, from the repository's root:

    .venv/bin/python examples/generate.py

About 20 seconds on two CPU cores; the first run on a machine compiles the CPU kernels as well.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from trtllm_redrafter import Engine, build, convert, load_engine

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
DRAFTER = ROOT / "drafters" / "smollm2-135m-instruct"


def stream_one(engine: Engine, prompt: str, max_tokens: int) -> None:
    print(f"> {prompt}")
    result = None
    for update in engine.stream(prompt, max_tokens=max_tokens):
        print(update.text, end="", flush=True)
        result = update.result or result
    assert result is not None
    print(f"\n[{len(result.token_ids)} tokens in {result.steps} steps: {result.acceptance_length or 1.0:.2f} per step,")
    print(f" {result.tokens_per_second or 0.0:.0f} tokens/s; steps with at least 1, 2, ... drafts accepted:", end=" ")
    print(f"{result.accepted_per_position}]\n")


def sample_a_batch(engine: Engine, prompts: list[str], max_tokens: int) -> None:
    """Prompts of one call run together. A seed makes sampled text repeatable, at any batch size."""
    results = engine.generate(prompts, max_tokens=max_tokens, temperature=0.7, top_p=0.9, seed=1)
    for prompt, result in zip(prompts, results, strict=True):
        print(f"> {prompt}\n{' '.join(result.text.split())} [{result.acceptance_length or 1.0:.2f} per step]\n")


def compare(engine: Engine, prompt: str, max_tokens: int) -> None:
    (plain,) = engine.generate([prompt], max_tokens=max_tokens, draft=False)
    (drafted,) = engine.generate([prompt], max_tokens=max_tokens)
    assert plain.token_ids == drafted.token_ids, "drafting never changes the text"
    speedup = plain.decode_seconds / drafted.decode_seconds
    print(f"the same {len(plain.token_ids)} tokens without and with drafting: {speedup:.2f} x as fast with it")


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert, build and generate with SmolLM2-135M.")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    if not MODEL.exists():
        raise SystemExit(f"{MODEL} is not there: run `make demo` once, it fetches the model")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = convert(base=MODEL, drafter=DRAFTER, output=Path(folder) / "checkpoint", num_beams=2, draft_len=3)
        directory = build(checkpoint=checkpoint, output=Path(folder) / "engine", max_batch_size=4, max_seq_len=512)
        with load_engine(directory) as engine:
            shape = engine.info.draft_shape
            assert shape is not None
            print(f"{engine.info.dtype} on {engine.info.device}, {shape.num_beams} beams of {shape.draft_len} tokens\n")
            stream_one(engine, "What is a tree?", arguments.max_tokens)
            sample_a_batch(engine, ["Name three rivers.", "Write a line about the sea."], arguments.max_tokens)
            compare(engine, "Explain how rain forms.", arguments.max_tokens)


if __name__ == "__main__":
    main()
