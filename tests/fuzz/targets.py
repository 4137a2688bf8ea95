"""What is broken and what is run on it: one row per kind of input, with commands from every part of the program."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from trtllm_redrafter.checkpoint.manifest import Manifest, record_tree
from trtllm_redrafter.errors import RedrafterError


@dataclass(frozen=True)
class Target:
    """Files that may be broken (patterns), and chains of commands, one of which runs; a failing command ends its chain.

    `{out}` is a new name for an output. `manifest` directories have theirs brought in line half of the time, so that
    what lies behind the hashes is reached too.
    """

    name: str
    files: tuple[str, ...]
    chains: tuple[tuple[str, ...], ...]
    manifest: str | None = None
    weight: int = 1


CONVERT = "convert --base base --drafter drafter --output {out}"
BUILD = "build --checkpoint {} --output {} --set build.max_seq_len=64"
EVALUATE = "evaluate --base base --drafter drafter --prompts plain.jsonl --grid 1x2,2x2 --max-tokens 2"
TRAIN = "train --base base --data data.jsonl --output {out} --plan --set train.draft_len=2"
RUN = "run --engine {engine} --prompt hi --max-tokens 3 --no-chat --device cpu"

TARGETS = (
    Target(
        "base",
        ("base/*",),
        (
            (
                CONVERT,
                "build --checkpoint {out} --output {out}e --set build.max_seq_len=64",
                RUN.format(engine="{out}e"),
            ),
            ("inspect base",),
            (TRAIN,),
            (EVALUATE,),
            ("verify checkpoint --against base",),
            ("plan recipe.yaml",),
            ("pipeline recipe.yaml --dry-run",),
            ("tune recipe.yaml",),
            (
                "build --checkpoint checkpoint --output {out} --tokenizer base --set build.max_seq_len=64",
                RUN.format(engine="{out}").replace("--no-chat", "--chat"),
            ),
        ),
        weight=5,
    ),
    Target("sharded", ("sharded/*",), (("convert --base sharded --tp-size 2 --output {out}", "verify {out}"),)),
    Target(
        "drafter",
        ("drafter/*", "pickled/*"),
        (
            (CONVERT, "verify {out}"),
            ("convert --base base --drafter pickled --output {out}",),
            ("inspect drafter",),
            ("inspect pickled",),
            (EVALUATE,),
            ("plan recipe.yaml",),
            ("tune recipe.yaml",),
            ("doctor recipe.yaml",),
        ),
        weight=2,
    ),
    Target(
        "checkpoint",
        ("checkpoint/*", "checkpoint/tokenizer/*"),
        (
            ("build --checkpoint checkpoint --output {out} --set build.max_seq_len=64", RUN.format(engine="{out}")),
            ("verify checkpoint",),
            ("inspect checkpoint",),
            ("verify engine --reference checkpoint --max-tokens 6",),
        ),
        "checkpoint",
        3,
    ),
    Target(
        "c16",
        ("c16/config.json", "c16/rank0.safetensors"),
        (
            ("build --checkpoint c16 --output {out} --set build.max_seq_len=64", RUN.format(engine="{out}")),
            ("build --checkpoint c16 --output {out} --backend tensorrt-llm --dry-run",),
        ),
        "c16",
        2,
    ),
    Target(
        "two",
        ("two/*",),
        (
            ("build --checkpoint two --output {out} --set build.max_seq_len=64",),
            ("convert --base two --tp-size 2 --output {out}",),
            ("verify two",),
            ("inspect two",),
        ),
        "two",
    ),
    Target(
        "engine",
        ("engine/*", "engine/tokenizer/*", "engine/checkpoint/*"),
        (
            (RUN.format(engine="engine"),),
            (RUN.format(engine="engine").replace("--no-chat", "--chat"),),
            ("run --engine engine --input prompts.jsonl --output {out}.jsonl --device cpu",),
            ("verify engine",),
            ("verify engine --against base",),
            ("inspect engine",),
            ("bench engine --prompts plain.jsonl --batch 1 --max-tokens 2 --repeats 3 --device cpu",),
            ("verify engine --reference checkpoint --max-tokens 6",),
        ),
        "engine",
        5,
    ),
    Target("e16", ("e16/*", "e16/checkpoint/*"), ((RUN.format(engine="e16"),), ("verify e16",)), "e16", 3),
    Target(
        "trt",
        ("trt/*", "trt/tokenizer/*"),
        (("run --engine trt --prompt hi",), ("inspect trt",), ("verify trt",), ("bench trt --batch 1",)),
        "trt",
    ),
    Target(
        "texts",
        ("prompts.jsonl", "plain.jsonl", "data.jsonl"),
        (
            ("run --engine engine --input prompts.jsonl --output {out}.jsonl --device cpu",),
            ("run --engine engine --input prompts.jsonl --json --device cpu",),
            (EVALUATE,),
            (TRAIN,),
            (TRAIN.replace("--data data.jsonl", "--prompts plain.jsonl"),),
            ("bench engine --prompts plain.jsonl --batch 1 --max-tokens 2 --repeats 3 --device cpu",),
        ),
        weight=4,
    ),
    Target(
        "recipe",
        ("recipe.yaml",),
        (
            ("plan recipe.yaml",),
            ("doctor recipe.yaml",),
            ("pipeline recipe.yaml --dry-run",),
            ("pipeline recipe.yaml --dry-run --json",),
            ("tune recipe.yaml",),
            ("bench recipe.yaml --max-tokens 2 --batch 1 --device cpu",),
        ),
        weight=3,
    ),
    Target("report", ("report.json",), (("plan recipe.yaml --set plan.acceptance_length=report.json",),)),
)

ARGUMENTS = (
    "convert --base base --drafter drafter --output {out} --num-beams {v} --draft-len {v}",
    "convert --base {v} --output {out}",
    "convert --base base --output {v}",
    "convert --base base --output {out} --tp-size {v} --dtype {v}",
    "build --checkpoint checkpoint --output {out} --max-batch-size {v} --max-seq-len {v}",
    "build --checkpoint {v} --output {out} --backend {v}",
    "run --engine engine --prompt {v} --max-tokens {v}",
    "run --engine engine --prompt hi --temperature {v} --top-k {v} --top-p {v} --seed {v} --max-tokens 2",
    "run --engine engine --prompt hi --num-beams {v} --draft-len {v} --max-tokens 2",
    "run --engine {v} --input {v} --output {v}",
    "inspect {v}",
    "verify {v} --against {v}",
    "verify engine --reference checkpoint --max-tokens {v} --min-acceptance {v}",
    "plan {v} --set {v}={v}",
    "plan recipe.yaml --set build.max_batch_size={v} --set convert.num_beams={v}",
    "doctor recipe.yaml --set tensorrt_llm.gpu={v}",
    "pipeline recipe.yaml --dry-run --set run.max_tokens={v} --set build.max_seq_len={v}",
    "evaluate --base base --drafter drafter --prompts plain.jsonl --grid {v} --max-tokens {v}",
    "train --base base --data data.jsonl --output {out} --plan --draft-len {v} --num-layers {v} --exit-dim {v}",
    "train --base base --data data.jsonl --output {out} --plan --epochs {v} --learning-rate {v} --max-steps {v}",
    "bench engine --prompts plain.jsonl --batch {v} --limit {v} --max-tokens 2 --repeats {v}",
    "bench compare {v} {v}",
    "tune recipe.yaml --grid {v} --batch {v} --target {v}",
)
"""Commands with `{v}` where an argument's value is made up."""

VALUES = (
    "", " ", "0", "-1", "1", "2", "3", "1000000", "9223372036854775808", "1e400", "nan", "inf", "-0.0", "0.5", "x",
    "base", "base/config.json", "/", "/dev/zero", "/dev/null", ".", "..", "a" * 300, "a/" * 2500 + "a", "\udcff",
    "\x1b[31mred", "\u202e", "1x1", "2x9999999", "1x2,,3", "null", "[1,2", "{a: 1}", "*a", "&a [*a]", "~nobody/x",
    "auto", "cuda:99",
    "9" * 5000, "h100-80gb", "recipe.yaml", "engine", "checkpoint", "prompts.jsonl",
)  # fmt: skip


def files_of(target: Target, folder: Path) -> list[Path]:
    return sorted(p for pattern in target.files for p in folder.glob(pattern) if p.is_file())


def repair_manifest(folder: Path, rng: random.Random) -> str:
    """Bring a directory's manifest in line with its files, or take it away, as far as it can still be read."""
    how = rng.choice(("kept", "in line", "in line", "gone"))
    try:
        if how == "in line":
            old = Manifest.read(folder)
            (folder / "manifest.json").unlink()  # a hard link to that of the inputs, which stay as they are
            Manifest(old.kind, old.inputs, old.options, old.derived, record_tree(folder)).write(folder)
        elif how == "gone":
            (folder / "manifest.json").unlink()
    except (RedrafterError, OSError):
        return "kept"
    return how
