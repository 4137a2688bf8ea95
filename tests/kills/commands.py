"""The commands of the campaign, their inputs, and what of their outputs must be equal whenever they are run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cli.tiny import write_models
from trtllm_redrafter.run import api

TRAIN = (
    "train --base base --prompts prompts.jsonl --output drafted --work-dir work --draft-len 3 --num-layers 1 "
    "--max-steps 3 --set train.window=16 --set train.windows=2 --set train.full_windows=1 --set train.grid=1x2 "
    "--set train.held_out=0.3 --set train.warmup_steps=1 --set train.save_every=1 --set train.max_answer_tokens=16"
)


@dataclass(frozen=True)
class Command:
    """One line to run again after each kill, and what may have been there before: the output of `earlier`."""

    line: str
    earlier: str | None = None


COMMANDS = {
    "convert": Command(
        "convert --base base --drafter drafter --output out --overwrite", "convert --base base --output out"
    ),
    "build": Command(
        "build --checkpoint ckpt --output out --max-seq-len 64 --overwrite",
        "build --checkpoint ckpt --output out --max-seq-len 32",
    ),
    "verify": Command("verify ckpt --against base"),
    "run": Command(
        "run --engine engine --input prompts.jsonl --output rows.jsonl --max-tokens 6 --resume",
        "run --engine engine --input others.jsonl --output rows.jsonl --max-tokens 6",
    ),
    "pipeline": Command("pipeline recipe.yaml", "pipeline recipe.yaml --set convert.num_beams=1 --set run.seed=1"),
    "train": Command(f"{TRAIN} --overwrite", f"{TRAIN} --learning-rate 0.01"),
    "train-resume": Command(f"{TRAIN} --overwrite --resume"),
    "evaluate": Command(
        "evaluate --base base --drafter drafter --prompts prompts.jsonl --grid 1x2 --max-tokens 6 --report out "
        "--overwrite",
        "evaluate --base base --drafter drafter --prompts others.jsonl --grid 1x2 --max-tokens 6 --report out",
    ),
    "bench": Command(
        "bench engine --prompts prompts.jsonl --batch 1 --max-tokens 3 --report out --overwrite",
        "bench engine --prompts prompts.jsonl --batch 1 --max-tokens 2 --report out",
    ),
    "tune": Command(
        "tune tuned.yaml --grid 1x2 --batch 1 --budget 1 --report out --overwrite",
        "tune tuned.yaml --grid 1x1 --batch 1 --report out",
    ),
}


def write_inputs(folder: Path) -> None:
    """Base, drafter, checkpoint, engine, prompts and recipes, named as the commands name them."""
    write_models(folder)
    api.convert(folder / "base", folder / "ckpt", drafter=folder / "drafter", num_beams=2)
    api.build(folder / "ckpt", folder / "engine", max_seq_len=96, max_batch_size=2)
    for name, stem, count in (("prompts", "Word", 5), ("others", "Name", 4)):
        rows = [json.dumps({"prompt": f"{stem} {i}"}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    recipe = {
        "base": "base", "drafter": "drafter", "work_dir": "work", "build": {"max_seq_len": 96, "max_batch_size": 2},
        "run": {"input": "prompts.jsonl", "output": "rows.jsonl", "max_tokens": 6},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tune = {"prompts": "prompts.jsonl", "max_tokens": 6, "steps": 2, "batch": "1"}
    (folder / "tuned.yaml").write_text(
        yaml.safe_dump({"base": "base", "drafter": "drafter", "engine": "engine", "tune": tune})
    )


MEASURED = ("second", "created", "finished", "manifest_sha256", "output_sha256", "platform")
"""Parts of the keys whose values differ each time."""

MEASURED_FILES = (".md", ".html", ".svg", "result.json", "tune.json", "hashes.json", "out/recipe.yaml")
"""Endings of files that hold times, of which only the presence can be compared."""


def digest(folder: Path) -> dict[str, str]:
    """Every file and directory below `folder` with a hash of what does not differ from run to run."""
    return {
        path.relative_to(folder).as_posix(): "directory" if path.is_dir() else _content(path)
        for path in sorted(folder.rglob("*"))
    }


def _content(path: Path) -> str:
    if path.as_posix().endswith(MEASURED_FILES):
        return "measured"
    data = path.read_bytes()
    if path.suffix == ".safetensors":  # the library writes the keys of its header in any order
        end = 8 + int.from_bytes(data[:8], "little")
        data = json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
    if path.suffix == ".json":
        data = json.dumps(_lasting(json.loads(data))).encode()
    if path.suffix == ".jsonl":
        data = b"\n".join(json.dumps(_lasting(json.loads(line))).encode() for line in data.splitlines())
    return hashlib.sha256(data).hexdigest()


def _lasting(value: Any) -> Any:
    """Without times, and without the hashes of files that hold times."""
    if isinstance(value, Mapping):
        return {
            key: _lasting(inner)
            for key, inner in value.items()
            if not any(part in key for part in MEASURED) and not key.endswith(("manifest.json", "metrics.json"))
        }
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value
