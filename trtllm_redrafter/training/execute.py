"""Follow a training plan: text, hidden states, loop, figures, drafter directory.

    result = train(plan_training(options), progress)
    result.output, result.metrics["held_out"]["acceptance"]

`work_dir` afterwards holds `answers.jsonl`, `cache/`, `metrics.jsonl` (one line per logged step) and
`state.safetensors`, from which `resume` goes on exactly where the last save was.

Under `torchrun` several processes follow the same plan. What goes to disk (answers, hidden states, the drafter) is
written by the first one while the others wait; the loop shares out the windows of each step (see `trainer.py`).

    torchrun --nproc-per-node 8 -m trtllm_redrafter train ...
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import as_output_error
from trtllm_redrafter.locks import exclusive
from trtllm_redrafter.progress import Progress, no_progress
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.scratch import replaced_file
from trtllm_redrafter.training.acceptance import borrowed_head, evaluate_grid, token_accuracy
from trtllm_redrafter.training.answers import AnswerWriter, TransformersWriter, engine_writer, write_answers
from trtllm_redrafter.training.cache import Cache, cache_key, open_or_build, plan_cache, weights_fingerprint
from trtllm_redrafter.training.data import TokenizedText
from trtllm_redrafter.training.drafter_files import export_weights, frequent_tokens, load_weights, write_drafter
from trtllm_redrafter.training.frozen_base import FrozenBase
from trtllm_redrafter.training.model import InputScales, TrainableDrafter
from trtllm_redrafter.training.plan import TrainPlan
from trtllm_redrafter.training.rows import TrainingRows
from trtllm_redrafter.training.trainer import BaseTensors, StepLog, Trainer

STATE = "state.safetensors"
LOG = "metrics.jsonl"
SCALE_SAMPLE = 65536
"""Rows looked at to size the input columns."""
MEASURE_ROWS = 512


@dataclass(frozen=True)
class TrainResult:
    output: Path
    metrics: dict[str, Any]
    cache_made: str | None
    """Why the hidden states were computed in this run; None when they were there."""


def train(plan: TrainPlan, progress: Progress, *, writer: AnswerWriter | None = None) -> TrainResult:
    """Run the plan. `writer` answers the prompts; None: transformers."""
    with work_lock(plan), process_group(plan.options.device) as device:
        base = FrozenBase.load(plan.options.base, device=device, dtype=plan.options.dtype)
        return _train(plan, base, writer or TransformersWriter(base), progress if is_first() else no_progress)


@contextmanager
def work_lock(plan: TrainPlan) -> Iterator[None]:
    """Keep other runs out of the work directory; of several processes of one run, the first one does."""
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    with exclusive(plan.options.work_dir / ".lock", "the work directory", where=plan.options.work_dir):
        yield


@contextmanager
def answer_writer(plan: TrainPlan, progress: Progress) -> Iterator[AnswerWriter | None]:
    """What writes a plan's answers: an engine; None (transformers) if several processes share the work."""
    if not plan.prompts or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield None
        return
    options = plan.options
    longest = max(len(prompt.token_ids) for prompt in plan.prompts)
    engine = engine_writer(
        options.base, options.work_dir, dtype=options.dtype, device=options.device, batch=options.writing.batch,
        max_prompt=longest, max_tokens=longest + options.writing.max_tokens, progress=progress,
    )  # fmt: skip
    with engine as writer:
        yield writer


def _train(plan: TrainPlan, base: FrozenBase, writer: AnswerWriter, progress: Progress) -> TrainResult:
    options = plan.options
    with first_alone():
        texts = list(plan.texts) or _written_texts(plan, writer, progress)
        learnt, held_out = split_texts(texts, options.settings.held_out, options.settings.seed)
        cache = _cached(plan, base, learnt, "cache", progress)
    tensors = BaseTensors(base.embedding, base.head, _loss_vocab(plan, cache.rows))
    trainer = make_trainer(plan, cache.rows, tensors)
    started = time.perf_counter()
    _run(trainer, options.work_dir, options.resume, options.settings.save_every, progress)
    metrics: dict[str, Any] = {
        "texts": len(learnt),
        "rows": len(cache.rows),
        "steps": trainer.step,
        "rows_seen": trainer.step * trainer.options.windows * trainer.options.window * trainer.world,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if is_first():
        shipped = load_weights(plan.spec, export_weights(trainer.model, torch.bfloat16))
        shipped = shipped.to(base.head.device, base.head.dtype)
        if held_out:
            rows = _cached(plan, base, held_out, "cache-held-out", progress).rows
            metrics["held_out"] = measure(shipped, tensors, rows, options.grid, progress)
        _export(plan, shipped, tensors, metrics)
    return TrainResult(options.output, metrics, cache.made)


def split_texts(
    texts: Sequence[TokenizedText], share: float, seed: int
) -> tuple[list[TokenizedText], list[TokenizedText]]:
    """Training and held-out texts; which ones depends on the seed alone. Training always keeps one."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    count = min(len(texts) - 1, round(share * len(texts)))
    held = set(order[:count])
    return [t for i, t in enumerate(texts) if i not in held], [t for i, t in enumerate(texts) if i in held]


def make_trainer(plan: TrainPlan, rows: TrainingRows, base: BaseTensors) -> Trainer:
    """A fresh drafter and its loop."""
    step = max(1, len(rows) // SCALE_SAMPLE)
    scales = InputScales.measure(rows.hidden[::step], base.embedding[rows.tokens[::step].long().to(base.head.device)])
    fit = plan.fit_for(len(rows))
    model = TrainableDrafter(plan.spec, seed=fit.seed, base_head=base.head, scales=scales)
    return Trainer(model.to(base.head.device), rows, base, fit)


def measure(
    model: TrainableDrafter, base: BaseTensors, rows: TrainingRows, grid: Sequence[DraftShape], progress: Progress
) -> dict[str, Any]:
    """Accuracy per position, and acceptance along these texts."""
    head = borrowed_head(model, base.head)
    shapes = [shape for shape in grid if shape.draft_len <= model.spec.draft_len]
    found = evaluate_grid(model, base, rows, shapes, head=head, batch=MEASURE_ROWS, categories=None, progress=progress)
    accuracy = token_accuracy(model, base, rows, head=head, batch=MEASURE_ROWS)
    return {"rows": len(rows), "accuracy": accuracy, "acceptance": [a.as_dict() for a in found]}


def _written_texts(plan: TrainPlan, writer: AnswerWriter, progress: Progress) -> list[TokenizedText]:
    prompts = [p.token_ids for p in plan.prompts]
    path = plan.options.work_dir / "answers.jsonl"
    answers = write_answers(prompts, writer, plan.options.writing, path, progress)
    texts = [TokenizedText.answer(p, a) for p, a in zip(prompts, answers, strict=True) if len(a) > 1]
    if not texts:
        raise InputError(
            "the base model's answers are all empty",
            where=path,
            why="it ended every text at once",
            remedy="check that the prompts go through the chat template this model was trained with",
        )
    return texts


def _cached(plan: TrainPlan, base: FrozenBase, texts: Sequence[TokenizedText], name: str, progress: Progress) -> Cache:
    options = plan.options
    sized = plan_cache(texts, plan.base.hidden_size, options.dtype)
    key = cache_key(texts, plan.base, weights_fingerprint(options.base), options.dtype)
    folder = options.work_dir / name
    return open_or_build(folder, texts, base, sized, key, batch_tokens=options.settings.batch_tokens, progress=progress)


def _loss_vocab(plan: TrainPlan, rows: TrainingRows) -> torch.Tensor:
    """The tokens most of the loss is restricted to; all of them when no draft vocabulary is asked for."""
    size = plan.base.vocab_size
    count = min(plan.options.settings.draft_vocab, size) or size
    return frequent_tokens(rows.tokens, size, count).long()


def _run(trainer: Trainer, work_dir: Path, resume: bool, save_every: int, progress: Progress) -> None:
    state, log = work_dir / STATE, work_dir / LOG
    if resume and state.exists():
        trainer.load(state)
        _cut_log(log, trainer.step)
    elif trainer.rank == 0:
        log.unlink(missing_ok=True)

    def note(line: StepLog) -> None:
        if trainer.rank == 0:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line.as_dict()) + "\n")

    with as_output_error(work_dir):
        while trainer.step < trainer.options.max_steps:
            trainer.run(note, progress, until=trainer.step + save_every)
            if trainer.rank == 0:
                trainer.save(state)


def _cut_log(log: Path, step: int) -> None:
    """Drop lines of steps that will be repeated."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with replaced_file(log) as cut:
            cut.write_text("".join(kept), encoding="utf-8")


def _export(plan: TrainPlan, model: TrainableDrafter, base: BaseTensors, metrics: dict[str, Any]) -> None:
    options = plan.options
    source = options.settings.data or options.settings.prompts
    provenance = {
        "trained_on": None if source is None else source.name,
        "written_by_the_base": not plan.exact,
        "rows": metrics["rows"],
        "steps": metrics["steps"],
        "seed": options.settings.seed,
        "torch": torch.__version__,
    }
    vocab = base.loss_vocab.to(torch.int32) if options.settings.draft_vocab else None
    write_drafter(
        options.output,
        model,
        plan.base,
        dtype=torch.bfloat16,
        provenance=provenance,
        metrics=metrics,
        draft_vocab=vocab,
        overwrite=options.overwrite,
    )


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the other processes if there are any; gives this process's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    if device == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block, then the others do, and find its files."""
    if dist.is_initialized() and not is_first():
        dist.barrier()
    yield
    if dist.is_initialized() and is_first():
        dist.barrier()
