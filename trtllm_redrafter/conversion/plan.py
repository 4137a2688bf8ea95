"""Plan a conversion: read headers and configs, check everything, decide every byte; write nothing.

    plan = plan_conversion(ConvertOptions(base=..., drafter=..., output=..., dtype="auto", tp_size=2, ...))
    print(plan.render())            # what will be read and written, and every derived value

All problems of base, drafter, options and disk are collected and raised as one error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from trtllm_redrafter.checkpoint.config import CheckpointConfig, config_dict
from trtllm_redrafter.checkpoint.layout import divisibility_problems, tensor_specs
from trtllm_redrafter.checkpoint.names import DRAFTER, TOKENIZER_DIRECTORY
from trtllm_redrafter.conversion.base import Base, open_base, with_tokenizer
from trtllm_redrafter.conversion.drafter import DrafterFiles
from trtllm_redrafter.conversion.drafter_config import RETRAIN, draft_shape, size_problems
from trtllm_redrafter.conversion.options import ConvertOptions, option_problems
from trtllm_redrafter.conversion.sources import RankFile, rank_tensor
from trtllm_redrafter.errors import InputError, MismatchError, Problem, RedrafterError, raise_together
from trtllm_redrafter.fsio import check_replaceable, human_bytes
from trtllm_redrafter.paths import check_place
from trtllm_redrafter.redrafter.config import DraftShape


@dataclass(frozen=True)
class ConversionPlan:
    """Everything a conversion will do. `ranks` hold the content of every rank file, block by block."""

    options: ConvertOptions
    config: CheckpointConfig
    base: Base
    drafter: DrafterFiles | None
    ranks: tuple[RankFile, ...]
    copies: tuple[tuple[Path, str], ...]
    """(source, name below the output) of files that are copied as they are."""
    notes: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(rank.size for rank in self.ranks)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files whose hashes go into the manifest."""
        return (*self.base.files, *(self.drafter.files if self.drafter else ()))

    @cached_property
    def derived(self) -> dict[str, Any]:
        """Values that follow from inputs and options, to be shown; the checkpoint stores each of them once."""
        config = self.config
        values: dict[str, Any] = {
            "architecture": config.architecture,
            "base_model_architecture": config.base_architecture,
            "base_kind": self.base.kind,
            "dtype": config.dtype,
            "tp_size": config.tp_size,
            "vocab_size": config.vocab_size,
            "padded_vocab_size": config.padded_vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "use_parallel_embedding": config.use_parallel_embedding,
            "quant_algo": config.quant_algo,
            "weight_bytes": self.weight_bytes,
            "tokenizer_sha256": self.base.tokenizer_sha256,
            "eos_token_ids": list(self.base.eos_token_ids),
        }
        shape = self.config.draft_shape
        if shape is not None and self.drafter is not None:
            values |= {
                "num_beams": shape.num_beams,
                "draft_len": shape.draft_len,
                "max_tree_tokens": shape.max_tree_tokens,
                "trained_draft_len": self.drafter.trained_draft_len,
                "tied_drafter_head": self.drafter.tie_lm_head,
            }
        return values

    def render(self) -> str:
        """The plan as text: reads, writes, derived values, notes."""
        options = self.options
        read = sum(path.stat().st_size for path in self.inputs)
        lines = [
            f"convert to {options.output}",
            f"  base      {options.base} ({self.base.kind}): {self.config.parameters_hint}",
        ]
        if self.drafter is not None:
            d = self.drafter.config
            kind = "RNN" if d.rnn else "no RNN"
            lines.append(
                f"  drafter   {self.drafter.path}: {d.num_layers} layers, exit_dim {d.exit_dim}, {kind}"
                + (", LM head from the base" if self.drafter.tie_lm_head else "")
            )
        lines.append(f"  reads     {len(self.inputs)} files, {human_bytes(read)}")
        lines += [
            f"  writes    {rank.name}, {len(rank.tensors)} tensors, {human_bytes(rank.size)}" for rank in self.ranks
        ]
        lines += [f"  copies    {target}" for _, target in self.copies]
        lines.append("  derived")
        width = max(len(key) for key in self.derived)
        lines += [f"    {key:<{width}}  {value}" for key, value in self.derived.items()]
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "options": self.options.as_dict(),
            "reads": [{"file": str(path), "bytes": path.stat().st_size} for path in self.inputs],
            "writes": [{"file": r.name, "tensors": len(r.tensors), "bytes": r.size} for r in self.ranks],
            "copies": [{"from": str(source), "to": target} for source, target in self.copies],
            "config": config_dict(self.config),
            "derived": self.derived,
            "notes": list(self.notes),
        }


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
        kind = self.kinds[0] if len(set(self.kinds)) == 1 else MismatchError
        raise_together(kind, self.problems, "the conversion cannot be done", where=where)


def plan_conversion(options: ConvertOptions) -> ConversionPlan:
    """Check everything that can be known before the first byte, and plan every file."""
    found = _Collector()
    found.add(*option_problems(options))
    found.run(lambda: check_replaceable(options.output, overwrite=options.overwrite))
    base = found.run(lambda: open_base(options))
    if base is not None:
        opened = base
        base = found.run(lambda: with_tokenizer(opened)) or base
    drafter, shape, shape_notes = _open_drafter(options, found)
    config = None
    if base is not None:
        config = base.config
        if drafter is not None and shape is not None:
            config = config.with_drafter(drafter.config, shape, greedy=options.greedy)
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
    shape, notes, problems = draft_shape(drafter, num_beams=options.num_beams, draft_len=options.draft_len)
    found.add(MismatchError, problems)
    return drafter, shape, notes


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
    """Notes on the pair of base and drafter."""
    notes = []
    if base.tokenizer_sha256 is None:
        notes.append("the base has no tokenizer files; pass --tokenizer to build")
    if drafter is not None:
        trained_for = drafter.base_model or {}
        expected, actual = trained_for.get("tokenizer_sha256"), base.tokenizer_sha256
        if expected and actual and expected != actual:
            notes.append("the drafter was trained with another tokenizer file than the base's: check that they agree")
        expected, actual = trained_for.get("weights_sample"), base.weights_sample
        if expected and actual and expected != actual:
            name = trained_for.get("name", "another model")
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
    found = size_problems(drafter, base.config)
    if drafter.tie_lm_head and not base.head:
        what = "the drafter borrows the base's LM head, which cannot be read"
        why = "the base checkpoint's LM head is quantized, or split by columns"
        found.append(Problem(what, str(drafter.path), why, RETRAIN))
    return found
