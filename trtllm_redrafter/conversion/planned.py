"""A conversion that has been planned and checked: every file it will write, and what people are told about it.

plan.render()                              # what is read and written, and every derived value
plan.ranks[0].tensors                      # the content of rank 0's file
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.config_writer import config_dict
from trtllm_redrafter.conversion.base import Base
from trtllm_redrafter.conversion.drafter import DrafterFiles
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.shards import RankFile


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
        """Values that follow from inputs and options, for the plan's text and the manifest."""
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
                "trained_draft_len": self.drafter.horizon,
                "tied_drafter_head": self.drafter.tie_lm_head,
            }
        return values

    def render(self) -> str:
        """The plan for people: reads, writes, derived values, notes."""
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
        lines.append(f"  reads     {len(self.inputs)} files, {_human_bytes(read)}")
        lines += [
            f"  writes    {rank.name}, {len(rank.tensors)} tensors, {_human_bytes(rank.size)}" for rank in self.ranks
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
            "reads": [_file(path) for path in self.inputs],
            "writes": [{"file": r.name, "tensors": len(r.tensors), "bytes": r.size} for r in self.ranks],
            "copies": [{"from": str(source), "to": target} for source, target in self.copies],
            "config": config_dict(self.config),
            "derived": self.derived,
            "notes": list(self.notes),
        }


def _human_bytes(count: int) -> str:
    """`269.1 MB`; powers of ten, as disks are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def _file(path: Path) -> dict[str, Any]:
    return {"file": str(path), "bytes": path.stat().st_size}
