"""TensorRT without a GPU: SmolLM2 and its drafter compiled for an RTX 4090, and its networks proved token by token.

    make demo-tensorrt

TensorRT-RTX compiles for a card that this machine does not have. The compiled plans cannot be run here; the networks
they were compiled from can, by onnxruntime: they decode 20 prompts, and so does the torch backend, in float32.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads ruin a busy machine

import sys
import time
from dataclasses import replace
from pathlib import Path

from fetch_models import fetch
from rich.console import Console
from rich.table import Table

from trtllm_redrafter import build, convert, load_engine
from trtllm_redrafter.backends.base import Request, Result, Runner, SamplingParams
from trtllm_redrafter.benchmark.prompts import built_in_prompts, choose
from trtllm_redrafter.errors import RedrafterError
from trtllm_redrafter.fsio import read_json

ROOT = Path(__file__).resolve().parent.parent
NAME = "smollm2-135m-instruct"
MODEL = Path(".cache") / NAME
DRAFTER = Path("drafters/smollm2-135m-instruct")
WORK = Path("runs/demo-tensorrt")
GPU = "rtx-4090"
PROMPTS, TOKENS = 20, 64
LIMITS = {"max_batch_size": 4, "max_input_len": 192, "max_seq_len": 320}
BEAMS, LENGTH = 2, 3


def main() -> int:
    console = Console(highlight=False)
    os.chdir(ROOT)
    try:
        with console.status("fetching SmolLM2-135M-Instruct"):
            made = fetch(NAME, MODEL)
        console.print(f"fetch    {'made' if made else 'found'} {MODEL}")
        for dtype in ("bfloat16", "float32"):
            compile_for_card(console, dtype)
        return 0 if prove(console) else 1
    except RedrafterError as error:
        console.print(f"error: {error.render()}", style="red", markup=False)
        return error.exit_code


def compile_for_card(console: Console, dtype: str) -> None:
    """bfloat16 is what a card would run, float32 what is compared."""
    checkpoint, engine = WORK / dtype / "checkpoint", WORK / dtype / "engine"
    start = time.perf_counter()
    with console.status(f"converting and compiling in {dtype}"):
        convert(base=MODEL, drafter=DRAFTER, output=checkpoint, dtype=dtype, num_beams=BEAMS, draft_len=LENGTH,
                overwrite=True)  # fmt: skip
        converted = time.perf_counter()
        build(checkpoint=checkpoint, output=engine, backend="tensorrt", tensorrt_llm={"gpu": GPU}, overwrite=True,
              **LIMITS)  # fmt: skip
    built = time.perf_counter()
    config = read_json(engine / "config.json")
    size = sum(file.stat().st_size for file in engine.rglob("*") if file.is_file())
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    peak = max(network["peak_bytes"] for network in config["networks"].values())
    console.print(
        f"compile  {dtype}: {config['compiler']['name']} {config['compiler']['version']} for {config['gpu']}, "
        f"{len(config['networks'])} networks in {built - converted:.0f} s (conversion {converted - start:.0f} s), "
        f"{peak / 1e9:.1f} GB of memory; engine {size / 1e6:.1f} MB beside {weights / 1e6:.0f} MB of weights"
    )


def prove(console: Console) -> bool:
    """Decode on both backends, with and without drafts; True when all tokens and statistics are equal."""
    folder = WORK / "float32"
    reference = build(checkpoint=folder / "checkpoint", output=folder / "torch", overwrite=True, **LIMITS)
    found: dict[str, dict[bool, list[Result]]] = {}
    for name, path, executor in (("torch", reference, None), ("onnxruntime", folder / "engine", "onnxruntime")):
        with load_engine(path, device="cpu", executor=executor) as engine:
            prompts = choose(built_in_prompts(), PROMPTS)
            requests = [
                Request(engine.runner.encode(p.prompt), SamplingParams(TOKENS, ignore_eos=True)) for p in prompts
            ]
            found[name] = decode(console, name, engine.runner, requests)
    return show(console, found)


def decode(console: Console, name: str, runner: Runner, requests: list[Request]) -> dict[bool, list[Result]]:
    results = {}
    for draft in (False, True):
        with console.status(f"{name}, {'drafting' if draft else 'no drafting'}"):
            results[draft] = runner.generate([replace(request, draft=draft) for request in requests])
    return results


def show(console: Console, found: dict[str, dict[bool, list[Result]]]) -> bool:
    table = Table("", "drafting", "tokens", "steps", "tokens per step", "same as torch")
    same = True
    for name, results in found.items():
        for draft, own in results.items():
            others = found["torch"][draft]
            equal = sum(a.token_ids == b.token_ids and a.steps == b.steps for a, b in zip(own, others, strict=True))
            same &= equal == len(own)
            tokens, steps = sum(len(r.token_ids) for r in own), sum(r.steps for r in own)
            per_step = 1 + sum(r.accepted_tokens for r in own) / steps
            table.add_row(name, f"{BEAMS} x {LENGTH}" if draft else "no", str(tokens), str(steps), f"{per_step:.2f}",
                          f"{equal} of {len(own)}")  # fmt: skip
    console.print(table)
    console.print("Texts and steps are identical." if same else "Texts or steps DIFFER.", style="" if same else "red")
    return same


if __name__ == "__main__":
    started = time.perf_counter()
    code = main()
    print(f"({time.perf_counter() - started:.0f} s)")
    sys.exit(code)
