"""Train the demo drafter for SmolLM2-135M-Instruct: write the text, learn from it, measure, export.

    python scripts/fetch_smollm2.py
    python scripts/train_smollm2_drafter.py --settings configs/drafters/smollm2-135m-instruct.json --output DIR

The settings file is the one the shipped drafter was made with, on one NVIDIA H200. Everything stays in the GPU's
memory (1.2 KB a token); a machine with less takes fewer prompts, which is a number in the settings file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from batch_llama import BatchLlama
from smollm2_data import (
    Pass,
    answer,
    answered_prompts,
    category,
    chat_ids,
    flatten,
    own_prompts,
    read_prompts,
    training_prompts,
    without_evaluation,
)
from tokenizers import Tokenizer

from trtllm_redrafter.fsio import check_replaceable
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.training.acceptance import Acceptance, borrowed_head, evaluate_grid, token_accuracy
from trtllm_redrafter.training.drafter_files import (
    BaseIdentity,
    export_weights,
    frequent_tokens,
    load_weights,
    write_drafter,
)
from trtllm_redrafter.training.loss import LossOptions
from trtllm_redrafter.training.model import DrafterSpec, HeadKind, InputScales, TrainableDrafter
from trtllm_redrafter.training.rows import TrainingRows
from trtllm_redrafter.training.trainer import BaseTensors, FitOptions, StepLog, Trainer

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 256
GRID = "1x3,1x4,1x5,2x3,2x4,2x5,3x3,3x5,4x4,5x5,8x3,8x5"


@dataclass(frozen=True)
class Measured:
    """Trajectories to measure on: the evaluation prompts, and prompts the base model wrote itself, none trained on."""

    rows: TrainingRows
    categories: list[str]


@dataclass
class Material:
    """Everything a training run starts from; made once, used by any number of variants."""

    base: BaseTensors
    rows: TrainingRows
    measured: dict[str, Measured]
    facts: dict[str, Any]
    prompts: list[str]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def prepare(model_dir: Path, settings: dict[str, Any], device: str) -> Material:
    """Write the training text and the trajectories to measure on."""
    started = time.perf_counter()
    model = BatchLlama(model_dir, device, torch.bfloat16)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    data = settings["data"]
    batch, limit = data["batch"], data["max_prompt_tokens"]
    measured = record_measured(model, tokenizer, data)
    held_out = set(measured.pop("prompts"))
    prompts = listed_prompts(model, tokenizer, data)
    prompts = [p for p in prompts if p not in held_out]
    ids = [p for p in chat_ids(tokenizer, prompts) if len(p) <= limit]
    say(f"{len(ids)} prompts after {time.perf_counter() - started:.1f} s")
    passes = [Pass(**work) for work in data["passes"]]
    rows = answer(model, ids, passes, batch, data["max_seconds"], say)
    facts = {
        "prompts": (int(rows.document[-1]) + 1) // len(passes),
        "answers": int(rows.document[-1]) + 1,
        "answer_tokens": len(rows),
        "generation_seconds": round(time.perf_counter() - started, 1),
    }
    say(f"rows: {facts}")
    vocab = frequent_tokens(rows.tokens, model.embedding.shape[0], settings["draft_vocab"])
    base = BaseTensors(model.embedding, model.embedding, vocab.to(device).long())
    return Material(base, rows, measured, facts, prompts)


def listed_prompts(model: BatchLlama, tokenizer: Tokenizer, data: dict[str, Any]) -> list[str]:
    """The prompts of an earlier run if the settings name a list, a new list otherwise."""
    if data.get("prompts"):
        return answered_prompts(data["prompts"])
    return training_prompts(
        model, tokenizer, data["own_prompts"], data["template_prompts"], data["batch"], data["seed"]
    )


def record_measured(model: BatchLlama, tokenizer: Tokenizer, data: dict[str, Any]) -> dict[str, Any]:
    """Greedy trajectories of the evaluation prompts at two lengths, and of prompts from another source."""
    prompts = read_prompts("eval_prompts.jsonl")
    torch.manual_seed(data["seed"] + 1)
    own = own_prompts(model, tokenizer, data["own_measured"] * 2, data["own_measured"] * 2)
    own = [p for p in without_evaluation(own) if len(p) < 600][: data["own_measured"]]
    found: dict[str, Any] = {"prompts": own}
    for name, texts, tokens in (("eval_128", prompts, 128), ("eval_256", prompts, 256), ("own_128", own, 128)):
        # One batch in the prompts' own order, so that categories line up.
        rows = flatten(model.generate(chat_ids(tokenizer, texts), tokens, 0.0), 0)
        found[name] = Measured(rows, [category(t) for t in texts])
    return found


def loss_options(settings: dict[str, Any], device: str) -> LossOptions:
    chosen = settings["loss"]
    return LossOptions(
        kd_weight=chosen["kd_weight"],
        ce_weight=chosen["ce_weight"],
        kd_temperature=chosen["kd_temperature"],
        position_weights=tuple(chosen["position_weights"]),
        chunk_windows=chosen["chunk_windows"],
        compile=device == "cuda",
    )


def fit_options(settings: dict[str, Any], device: str) -> FitOptions:
    chosen = settings["fit"]
    return FitOptions(
        loss=loss_options(settings, device),
        window=WINDOW,
        accumulation=1,
        schedule="cosine",
        autocast=True,
        **chosen,
    )


def train(
    material: Material, settings: dict[str, Any], log_path: Path | None
) -> tuple[TrainableDrafter, dict[str, Any]]:
    """One variant to the end of its schedule; the drafter with its weights as they will be shipped (bfloat16)."""
    base, rows = material.base, material.rows
    device = str(base.head.device.type)
    vocab_size, hidden_size = base.head.shape
    sizes = settings["drafter"]
    config = DrafterConfig(vocab_size, hidden_size, sizes["exit_dim"], sizes["num_layers"], rnn=True)
    spec = DrafterSpec(config, HeadKind(sizes["head"]), sizes["draft_len"])
    sample = torch.arange(0, len(rows), max(1, len(rows) // 65536), device=rows.tokens.device)
    scales = InputScales.measure(rows.hidden[sample], base.embedding[rows.tokens[sample].long()])
    model = TrainableDrafter(spec, seed=settings["fit"]["seed"], scales=scales).to(device)
    options = fit_options(settings, device)
    trainer = Trainer(model, rows, base, options)
    logs: list[StepLog] = []

    def note(line: StepLog) -> None:
        logs.append(line)
        say(f"{settings['name']} {json.dumps(line.as_dict())}")
        if log_path is not None:
            with log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line.as_dict()) + "\n")

    started = time.perf_counter()
    trainer.run(note, no_progress, drop_first=10)
    facts = {
        "steps": options.max_steps,
        "rows_seen": options.max_steps * options.windows * options.window,
        "rows_per_second": round(logs[-1].rows_per_second),
        "seconds": round(time.perf_counter() - started, 1),
        "final_loss": round(logs[-1].loss, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    shipped = load_weights(spec, export_weights(model, torch.bfloat16)).to(device, torch.bfloat16)
    return shipped, facts


def parse_grid(text: str) -> list[DraftShape]:
    return [DraftShape(*map(int, setting.split("x"))) for setting in text.split(",")]


def measure(
    model: TrainableDrafter, material: Material, grid: str, sets: tuple[str, ...], vocab: torch.Tensor | None
) -> dict[str, Any]:
    """Acceptance over the grid and accuracy per position, on each named set."""
    head = borrowed_head(model, material.base.head, vocab)
    shapes = [s for s in parse_grid(grid) if s.draft_len <= model.spec.draft_len]
    found: dict[str, Any] = {}
    for name in sets:
        chosen = material.measured[name]
        results: list[Acceptance] = evaluate_grid(
            model,
            material.base,
            chosen.rows,
            shapes,
            head=head,
            batch=2048,
            categories=chosen.categories,
            progress=no_progress,
        )
        accuracy = token_accuracy(model, material.base, chosen.rows, head=head, batch=2048)
        found[name] = {"acceptance": [r.as_dict() for r in results], "accuracy": accuracy, "rows": len(chosen.rows)}
        say(name + " " + " ".join(f"{r.shape.name}={r.acceptance_length:.3f}" for r in results))
        say(name + " top1 " + " ".join(f"{a['top1']:.3f}" for a in accuracy))
    return found


def ship(
    model: TrainableDrafter,
    material: Material,
    settings: dict[str, Any],
    facts: dict[str, Any],
    model_dir: Path,
    output: Path,
) -> None:
    """Measure the final drafter in full and write its directory."""
    vocab = material.base.loss_vocab.to("cpu", torch.int32)
    sets = tuple(material.measured)
    metrics = {
        "data": material.facts,
        "training": facts,
        "full_vocabulary": measure(model, material, GRID, sets, None),
        f"vocabulary_{settings['draft_vocab']}": measure(model, material, GRID, sets, vocab),
        "tokens_outside_draft_vocab": outside(material, vocab),
    }
    tokenizer_hash = hashlib.sha256((model_dir / "tokenizer.json").read_bytes()).hexdigest()
    hidden_size = material.base.head.shape[1]
    base = BaseIdentity("SmolLM2-135M-Instruct", hidden_size, material.base.head.shape[0], tokenizer_hash)
    device = torch.cuda.get_device_name() if material.base.head.is_cuda else "CPU"
    provenance = {"script": "scripts/train_smollm2_drafter.py", "settings": settings, "device": device}
    write_drafter(
        output,
        model,
        base,
        dtype=torch.bfloat16,
        provenance=provenance | {"torch": torch.__version__},
        metrics=metrics,
        draft_vocab=vocab,
        overwrite=True,
    )


def outside(material: Material, vocab: torch.Tensor) -> dict[str, float]:
    """Share of the measured tokens that a drafter restricted to `vocab` cannot propose."""
    known = set(vocab.tolist())
    return {
        name: round(sum(int(t) not in known for t in chosen.rows.tokens.tolist()) / len(chosen.rows), 5)
        for name, chosen in material.measured.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "smollm2-135m-instruct")
    parser.add_argument("--settings", type=Path, default=ROOT / "configs" / "drafters" / "smollm2-135m-instruct.json")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    check_replaceable(args.output, overwrite=True)
    settings = json.loads(args.settings.read_text(encoding="utf-8"))
    material = prepare(args.model, settings, args.device)
    model, facts = train(material, settings, args.output.with_suffix(".metrics.jsonl"))
    ship(model, material, settings, facts, args.model, args.output)
    print(json.dumps({"drafter": str(args.output), **material.facts, **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
