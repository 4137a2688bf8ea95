"""What CI needs around the command line: which engines to build, and whether they write what they used to.

    python scripts/ci_engines.py matrix --only llama-3.1-8b     # engines=[{"name": ..., "gpu": ..., "key": ...}]
    python scripts/ci_engines.py golden --report gate.out --file configs/golden/llama-3.1-8b.json

`matrix` plans every recipe in configs/ for the tensorrt-llm backend, so a recipe that no longer fits its GPU fails here
and not after an hour on a GPU runner. The key changes with everything a recipe says and with this package's version,
not with the models' content, which only the runner sees: it keeps two builds of one engine from running at once, and
what was built is found again by `tensorrt_llm.cache_dir`, whose keys hold the checkpoint's hashes.
`golden` compares the tokens of a parity report with those of the first accepted build. Where there are none yet it
writes them, for a person to look at and commit, and exits with 10, so that nobody takes an unchecked file for a proof.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_redrafter import __version__
from trtllm_redrafter.checkpoint.config import config_dict
from trtllm_redrafter.errors import InputError, RedrafterError, UsageError, VerificationError
from trtllm_redrafter.fsio import read_json, write_json
from trtllm_redrafter.run.hardware_plan import RecipePlan, plan_recipe
from trtllm_redrafter.settings import file_layers, resolve

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NEW_GOLDEN = 10


def engine_recipes(configs: Path) -> list[Path]:
    """Recipes for the tensorrt-llm backend that name a base model; presets do not."""
    found = []
    for path in sorted(configs.glob("*.yaml")):
        recipe = resolve(file_layers(path)).recipe
        if recipe.backend == "tensorrt-llm" and recipe.base is not None:
            found.append(path)
    return found


def matrix(configs: Path, only: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per engine; `UsageError` for names that are no recipe, and whatever a plan refuses."""
    recipes = {path.stem: path for path in engine_recipes(configs)}
    unknown = [name for name in only if name not in recipes]
    if unknown:
        raise UsageError(f"no recipe: {', '.join(unknown)}", where=configs, remedy=f"known are {', '.join(recipes)}")
    return [
        entry(name, plan_recipe(resolve(file_layers(path)), name=name))
        for name, path in recipes.items()
        if not only or name in only
    ]


def entry(name: str, plan: RecipePlan) -> dict[str, Any]:
    """What a job needs to know. Below the break-even of one request, drafting would be a loss: that is the floor."""
    recipe = plan.resolved.recipe
    assert recipe.base is not None
    floor = plan.latency.rows[0].break_even
    return {
        "name": name,
        "base": recipe.base.name,
        "drafter": recipe.drafter.name if recipe.drafter is not None else "",
        "gpu": plan.build.target.name,
        "ranks": plan.model.config.tp_size,
        "key": content_key(plan),
        "min_acceptance": round(floor, 2) if recipe.drafter is not None else 1.0,
    }


def content_key(plan: RecipePlan) -> str:
    """Changes with the model's sizes, every flag, how it runs, the release and this package; not with directories."""
    described = {
        "version": __version__,
        "model": config_dict(plan.model.config),
        "flags": [(flag.name, flag.value) for flag in plan.build.flags.flags],
        "release": plan.build.settings.version,
        "gpu": plan.build.target.name,
        "runtime": plan.build.settings.runtime.as_dict(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def golden(report: Mapping[str, Any], file: Path) -> str | None:
    """None when the tokens are those of `file`; a note when there were none and they have been written."""
    tokens = report.get("token_ids")
    if report.get("ok") is not True or not isinstance(tokens, list) or not tokens:
        raise InputError(
            "the report is not of a passed parity gate", remedy="run `verify ENGINE --reference CHECKPOINT`"
        )
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"token_ids": tokens})
        return f"{file} is new: read the texts, then commit it"
    known = read_json(file).get("token_ids")
    differ = [i for i, (a, b) in enumerate(zip(known or [], tokens, strict=False), start=1) if a != b]
    if not isinstance(known, list) or len(known) != len(tokens) or differ:
        why = f"prompts {', '.join(map(str, differ))} differ" if differ else "another number of prompts"
        remedy = "where the parity gate passes, these are ties: read the texts, then replace the file"
        raise VerificationError("the tokens are not the golden ones", where=file, why=why, remedy=remedy)
    return None


def read_report(path: Path) -> dict[str, Any]:
    """The JSON document on the last line of a command's output."""
    try:
        value = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise InputError("there is no JSON document at the end", where=path, why=str(error)) from error
    if not isinstance(value, dict):
        raise InputError("the last line is not a JSON object", where=path)
    return value


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Engine builds of continuous integration.")
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("matrix", help="Print `engines=[...]` for a job matrix.")
    planning.add_argument("--only", default="", help="Recipe names, separated by commas; empty for all.")
    planning.add_argument("--configs", type=Path, default=CONFIGS)
    comparing = commands.add_parser("golden", help="Compare a parity report's tokens with known ones.")
    comparing.add_argument("--report", type=Path, required=True)
    comparing.add_argument("--file", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "matrix":
            only = [name.strip() for name in chosen.only.split(",") if name.strip()]
            print("engines=" + json.dumps(matrix(chosen.configs, only)))
            return 0
        note = golden(read_report(chosen.report), chosen.file)
    except RedrafterError as error:
        print(f"error: {error.render()}", file=sys.stderr)
        return error.exit_code
    if note is not None:
        print(note, file=sys.stderr)
    return 0 if note is None else NEW_GOLDEN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
