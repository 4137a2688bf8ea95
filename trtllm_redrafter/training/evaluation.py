"""Is this drafter worth it? Acceptance for every setting of a grid, before anything is converted or a GPU is rented.

Each prompt is decoded once, greedily, by the base model; the drafter then proposes along the recorded texts (see
`acceptance.py` for why that is exact).

    report = evaluate(options, progress)
    print(report.render())
    report.passes            # False when no setting reaches options.min_acceptance
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trtllm_redrafter.backends.torch.weights import DTYPES
from trtllm_redrafter.checkpoint.draft_vocab import read_draft_vocab
from trtllm_redrafter.checkpoint.fields import FieldReader
from trtllm_redrafter.checkpoint.names import DRAFT_VOCAB_FILE, DRAFTER_WEIGHTS
from trtllm_redrafter.errors import InputError, Problem, UsageError, raise_together
from trtllm_redrafter.fsio import CREATOR, atomic_directory, check_replaceable, read_json, sha256_file, write_json
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.settings.schema import EvaluateSection
from trtllm_redrafter.settings.values import fill
from trtllm_redrafter.training.acceptance import Acceptance, borrowed_head, evaluate_grid, token_accuracy
from trtllm_redrafter.training.answers import AnswerWriter, TransformersWriter, WritingOptions, in_batches
from trtllm_redrafter.training.cache import rows_in_memory
from trtllm_redrafter.training.data import TokenizedText, check_range, read_prompts
from trtllm_redrafter.training.drafter_files import read_drafter
from trtllm_redrafter.training.frozen_base import FrozenBase, base_identity, dtype_problems, load_tokenizer
from trtllm_redrafter.training.model import TrainableDrafter
from trtllm_redrafter.training.trainer import BaseTensors


@dataclass(frozen=True)
class EvaluateOptions:
    """One evaluation, of the prompts in a file. `grid` holds the shapes to draft with."""

    base: Path
    drafter: Path
    prompts: Path
    settings: EvaluateSection
    grid: tuple[DraftShape, ...]
    dtype: str
    device: str
    overwrite: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def writing(self) -> WritingOptions:
        """Greedy: only then does the text not depend on the drafter."""
        return fill(WritingOptions, self.settings, temperature=0.0, seed=0)

    def check(self) -> None:
        """Raise `UsageError` with everything that is contradictory or out of range."""
        found = [problem for shape in self.grid for problem in shape.problems()] + self.writing.problems()
        raise_together(UsageError, [*found, *dtype_problems(self.dtype)], "the evaluation cannot start")


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured."""

    options: EvaluateOptions
    texts: int
    tokens: int
    acceptance: list[Acceptance]
    accuracy: list[dict[str, float]]
    drafted_from: int
    """Token ids the head was computed on."""
    drafter_sha256: str | None = None
    """Of its weights, so that a plan can tell whether the figures are this drafter's; None: not one file."""

    @property
    def best(self) -> Acceptance:
        return max(self.acceptance, key=lambda a: a.acceptance_length)

    @property
    def passes(self) -> bool:
        floor = self.options.settings.min_acceptance
        return floor is None or self.best.acceptance_length >= floor

    def as_dict(self) -> dict[str, Any]:
        return {
            "base": self.options.base.name,
            "drafter": self.options.drafter.name,
            "drafter_sha256": self.drafter_sha256,
            "prompts": self.texts,
            "tokens": self.tokens,
            "max_tokens": self.options.settings.max_tokens,
            "dtype": self.options.dtype,
            "drafted_from_tokens": self.drafted_from,
            "min_acceptance": self.options.settings.min_acceptance,
            "passes": self.passes,
            "best": self.best.shape.name,
            "acceptance": [a.as_dict() for a in self.acceptance],
            "accuracy": self.accuracy,
        }

    def render(self) -> str:
        """A Markdown table and what it means."""
        lines = [
            f"{self.texts} prompts, {self.tokens} tokens, greedy, {self.options.dtype}",
            "",
            "| beams x length | acceptance length | 95 % interval | mean over rows | acceptance rate per position |",
            "|---|---|---|---|---|",
        ]
        for a in self.acceptance:
            rates = " ".join(f"{rate:.2f}" for rate in a.acceptance_rate_per_position)
            length = f"{a.acceptance_length:.2f} | {a.low:.2f}–{a.high:.2f} | {a.mean_over_rows:.2f}"
            lines.append(f"| {a.shape.name} | {length} | {rates} |")
        top1 = " ".join(f"{a['top1']:.3f}" for a in self.accuracy)
        top5 = " ".join(f"{a['top5']:.3f}" for a in self.accuracy)
        return "\n".join([*lines, "", f"right token per position: top-1 {top1}; top-5 {top5}"])

    def write(self, folder: Path) -> None:
        with atomic_directory(folder, overwrite=self.options.overwrite) as work:
            write_json(work / "report.json", self.as_dict())
            (work / "report.md").write_text(self.render() + "\n", encoding="utf-8")
            write_json(work / "manifest.json", {"kind": "report", "creator": {"name": CREATOR}})


def evaluate(options: EvaluateOptions, progress: Progress, *, writer: AnswerWriter | None = None) -> EvaluationReport:
    """Measure, and write the report if one is asked for. Refusals come before the base model is loaded."""
    options.check()
    settings = options.settings
    if settings.report is not None:
        check_replaceable(settings.report, overwrite=options.overwrite)
    drafter = read_drafter(options.drafter, max(shape.draft_len for shape in options.grid))
    check_fits(drafter, options)
    tokenizer, kwargs = load_tokenizer(options.base), options.chat_template_kwargs
    prompts = read_prompts(options.prompts, tokenizer, max_tokens=settings.max_text_tokens, template_kwargs=kwargs)
    check_range(prompts, options.prompts, tokenizer, drafter.spec.config.vocab_size)  # the base's: see check_fits
    base = FrozenBase.load(options.base, device=options.device, dtype=options.dtype)
    answers: list[list[int]] = []
    for written in in_batches([p.token_ids for p in prompts], writer or TransformersWriter(base), options.writing):
        answers += written
        progress("decode prompts", len(answers), len(prompts), "prompts")
    texts = [TokenizedText.answer(p.token_ids, a) for p, a in zip(prompts, answers, strict=True)]
    rows = rows_in_memory(texts, base, settings.batch_tokens, progress)
    tensors = BaseTensors(base.embedding, base.head, torch.arange(base.head.shape[0]))
    drafter = drafter.to(options.device, DTYPES[options.dtype])
    vocab = draft_vocab(options.drafter) if settings.draft_vocab else None
    head = borrowed_head(drafter, base.head, vocab)
    batch, categories = settings.batch_rows, [p.category for p in prompts]
    found = evaluate_grid(
        drafter, tensors, rows, options.grid, head=head, batch=batch, categories=categories, progress=progress
    )
    accuracy = token_accuracy(drafter, tensors, rows, head=head, batch=batch)
    size = base.head.shape[0] if vocab is None else len(vocab)
    weights = options.drafter / DRAFTER_WEIGHTS
    sha256 = sha256_file(weights) if weights.is_file() else None
    report = EvaluationReport(options, len(texts), len(rows), found, accuracy, size, sha256)
    if settings.report is not None:
        report.write(settings.report)
    return report


def draft_vocab(drafter: Path) -> torch.Tensor | None:
    """The token ids that drafts should be taken from, if the drafter directory has such a list."""
    path = drafter / DRAFT_VOCAB_FILE
    if not path.exists():
        return None
    fields = FieldReader(read_json(drafter / "config.json"), drafter / "config.json")
    size = fields.size("vocab_size")
    raise_together(InputError, fields.problems, "the drafter's config.json is not usable", where=drafter)
    return read_draft_vocab(path, size)


def check_fits(drafter: TrainableDrafter, options: EvaluateOptions) -> None:
    """`UsageError` if the drafter was trained for a base of other sizes, or for shorter drafts."""
    base, config = base_identity(options.base), drafter.spec.config
    found = []
    for name, theirs, ours in (
        ("hidden_size", base.hidden_size, config.hidden_size),
        ("vocab_size", base.vocab_size, config.vocab_size),
    ):
        if theirs != ours:
            found.append(
                Problem(
                    f"{name} is {ours} in the drafter and {theirs} in the base model",
                    str(options.drafter),
                    remedy="pass the base model the drafter was trained for",
                )
            )
    for shape in options.grid:
        if shape.draft_len > drafter.spec.draft_len:
            found.append(
                Problem(
                    f"{shape.name} drafts further than the {drafter.spec.draft_len} tokens the drafter was trained on",
                    remedy=f"use lengths up to {drafter.spec.draft_len}",
                )
            )
    raise_together(UsageError, found, "the drafter cannot be evaluated like this")
