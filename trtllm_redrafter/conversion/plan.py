"""Plan a conversion: read headers and configs, check everything, decide every byte; write nothing.

    plan = plan_conversion(ConvertOptions(base=..., drafter=..., output=..., dtype="auto", tp_size=2, ...))
    print(plan.render())            # what will be read and written, and every derived value

All problems of base, drafter, options and disk are collected and raised as one error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.layout import divisibility_problems, tensor_specs
from trtllm_redrafter.checkpoint.names import DRAFTER, TOKENIZER_DIRECTORY
from trtllm_redrafter.conversion.base import Base, open_base, with_text
from trtllm_redrafter.conversion.drafter import DrafterFiles, draft_shape
from trtllm_redrafter.conversion.options import ConvertOptions, option_problems
from trtllm_redrafter.conversion.planned import ConversionPlan
from trtllm_redrafter.conversion.shards import RankFile, rank_tensor
from trtllm_redrafter.errors import InputError, MismatchError, Problem, RedrafterError
from trtllm_redrafter.fsio import check_replaceable
from trtllm_redrafter.paths import check_place
from trtllm_redrafter.redrafter.config import DraftShape

T = TypeVar("T")


class _Collector:
    """Runs checks and keeps their problems, so that one bad input does not hide another."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.kinds: list[type[RedrafterError]] = []

    def run(self, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except RedrafterError as e:
            self.add(type(e), list(e.problems or (e.problem,)))
        return None

    def add(self, kind: type[RedrafterError], problems: list[Problem]) -> None:
        self.problems += problems
        self.kinds += [kind] * bool(problems)

    def raise_all(self, where: Path) -> None:
        if not self.problems:
            return
        kind = self.kinds[0] if len(set(self.kinds)) == 1 else MismatchError
        if len(self.problems) == 1:
            p = self.problems[0]
            raise kind(p.what, where=p.where, why=p.why, remedy=p.remedy)
        raise kind("the conversion cannot be done", where=where, problems=self.problems)


def plan_conversion(options: ConvertOptions) -> ConversionPlan:
    """Check everything that can be known before the first byte, and plan every file."""
    found = _Collector()
    found.add(*option_problems(options))
    found.run(lambda: check_replaceable(options.output, overwrite=options.overwrite))
    base = found.run(lambda: open_base(options))
    if base is not None:
        opened = base
        base = found.run(lambda: with_text(opened)) or base
    drafter, shape, shape_notes = _open_drafter(options, found)
    config = None
    if base is not None:
        config = _target_config(base.config, drafter, shape, options)
        found.add(MismatchError, [*base.problems, *(_pair_problems(base, drafter) if drafter else ())])
        if options.tp_size >= 1:
            found.add(MismatchError, divisibility_problems(config, str(options.base)))
    found.raise_all(options.base)
    assert base is not None and config is not None
    ranks = tuple(_rank(base, drafter, config, rank) for rank in range(config.tp_size))
    copies = _copies(base, drafter)
    notes = (*base.notes, *shape_notes, *_notes(base, drafter, options))
    plan = ConversionPlan(options, config, base, drafter, ranks, copies, notes)
    needed = plan.weight_bytes + sum(path.stat().st_size for path, _ in copies)
    found.run(lambda: check_place(options.output, needed))
    found.raise_all(options.output)
    return plan


def _open_drafter(
    options: ConvertOptions, found: _Collector
) -> tuple[DrafterFiles | None, DraftShape | None, list[str]]:
    """The drafter, the shape of its drafts, and where the shape comes from."""
    if options.drafter is None:
        return None, None, []
    directory = options.drafter
    drafter = found.run(lambda: DrafterFiles.open(directory))
    if drafter is None:
        return None, None, []
    found.add(InputError, list(drafter.problems))
    shape, notes, problems = draft_shape(options, drafter)
    found.add(MismatchError, problems)
    return drafter, shape, notes


def _target_config(
    base: CheckpointConfig, drafter: DrafterFiles | None, shape: DraftShape | None, options: ConvertOptions
) -> CheckpointConfig:
    if drafter is None or shape is None:
        return base
    return base.with_drafter(drafter.config, shape, greedy=options.greedy)


def _rank(base: Base, drafter: DrafterFiles | None, config: CheckpointConfig, rank: int) -> RankFile:
    tensors = base.rank_tensors(rank)
    if drafter is not None:
        specs = tensor_specs(config)
        for name, sources in drafter.sources(base.head).items():
            tensors[DRAFTER + name] = rank_tensor(specs[DRAFTER + name], sources, config, rank)
    return RankFile.of(rank, tensors)


def _copies(base: Base, drafter: DrafterFiles | None) -> tuple[tuple[Path, str], ...]:
    copies = [(path, f"{TOKENIZER_DIRECTORY}/{path.name}") for path in base.tokenizer]
    copies += [(path, path.name) for path in base.copied]
    if drafter is not None and drafter.draft_vocab is not None:
        copies.append((drafter.draft_vocab, drafter.draft_vocab.name))
    return tuple(copies)


def _notes(base: Base, drafter: DrafterFiles | None, options: ConvertOptions) -> list[str]:
    """What people should know of the two together."""
    notes = []
    if base.tokenizer_sha256 is None:
        notes.append("the base has no tokenizer files; pass --tokenizer to build")
    if drafter is not None:
        expected, actual = drafter.base_identity.get("tokenizer_sha256"), base.tokenizer_sha256
        if expected and actual and expected != actual:
            notes.append("the drafter was trained with another tokenizer file than the base's: check that they agree")
        expected, actual = drafter.base_identity.get("weights_sample"), base.weights_sample
        if expected and actual and expected != actual:
            name = drafter.base_identity.get("name", "another model")
            notes.append(
                f"warning: the drafter was trained for {name}, whose weights are not this base's: texts stay right, "
                "but fewer drafts are accepted; `evaluate` measures how many"
            )
        if not options.greedy:
            notes.append(
                "TensorRT-LLM's sampling rule for drafted tokens changes the distribution of the text; greedy does not"
            )
    return notes


def _pair_problems(base: Base, drafter: DrafterFiles) -> list[Problem]:
    """What does not fit between the base model and the drafter."""
    found = []
    where = str(drafter.path)
    retrain = "train a drafter for this base, or pass the base it was trained on"
    if drafter.config.hidden_size != base.config.hidden_size:
        what = f"the drafter's hidden size is {drafter.config.hidden_size}, the base's {base.config.hidden_size}"
        found.append(Problem(what, where, "the drafter reads the base's hidden states", retrain))
    if drafter.config.vocab_size != base.config.vocab_size:
        what = f"the drafter's vocabulary is {drafter.config.vocab_size}, the base's {base.config.vocab_size}"
        found.append(Problem(what, where, _vocabulary_reason(base, drafter), retrain))
    if drafter.tie_lm_head and not base.head:
        why = "the base checkpoint's LM head is quantized, or divided by columns"
        found.append(Problem("the drafter borrows the base's LM head, which cannot be read", where, why, retrain))
    return found


def _vocabulary_reason(base: Base, drafter: DrafterFiles) -> str:
    algo = base.config.quant_algo or ""
    if "AWQ" in algo and base.config.vocab_size == -(-drafter.config.vocab_size // 64) * 64:
        return f"NVIDIA's exporter pads the vocabulary to a multiple of 64 for {algo}; drafts must stay inside it"
    return "drafted tokens are the base's tokens"
