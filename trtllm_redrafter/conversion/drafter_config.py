"""A drafter's config.json, the same for every command: its sizes, how far ahead it was trained, how much it may draft.

drafter = read_drafter_config(Path("redrafter_vicuna-7b_n_5_lr_0.001_layers_2"))
drafter.config, drafter.trained_draft_len            # DrafterConfig(...), 5
shape, notes, problems = draft_shape(drafter, num_beams=None, draft_len=None)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.fields import FieldReader
from trtllm_redrafter.errors import InputError, Problem, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.redrafter.config import (
    MAX_DRAFT_LEN,
    MAX_NUM_BEAMS,
    NVIDIA_DRAFT_LEN,
    NVIDIA_NUM_BEAMS,
    DrafterConfig,
    DraftShape,
)

DRAFT_LEN_IN_NAME = re.compile(r"_n_(\d+)(?:_|$)")
"""Apple's trainer names its output `…_n_5_lr_…`: the drafter was trained on 5 tokens after the guaranteed one."""

RETRAIN = "train a drafter for this base, or pass the base it was trained on"


@dataclass(frozen=True)
class DrafterSettings:
    """What config.json says of a drafter; `num_beams` and `trained_draft_len` are None where it does not say."""

    path: Path
    """The drafter's directory."""
    config: DrafterConfig
    num_beams: int | None = None
    trained_draft_len: int | None = None
    """How many tokens ahead the drafter was trained."""
    trained_draft_len_source: str = "not stated"
    tie_lm_head: bool = False
    base_model: Mapping[str, Any] | None = None
    """Identity of the base model it was trained for, as `train` writes it."""


def read_drafter_config(path: Path) -> DrafterSettings:
    """The settings of the drafter in directory `path`; `InputError` lists every key that is missing or wrong."""
    if not path.is_dir():
        raise InputError("the drafter directory does not exist", where=path, remedy="check --drafter")
    raw = read_json(path / "config.json")
    fields = FieldReader(raw, path / "config.json")
    config = DrafterConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        exit_dim=fields.size("exit_dim"),
        num_layers=fields.size("num_draft_layers", minimum=0),
        rnn=fields.flag("rnn", None),
    )
    trained, source = _trained_draft_len(path, fields)
    num_beams, tied = fields.optional_size("num_beams"), fields.flag("tie_lm_head", False)
    raise_together(InputError, fields.problems, "the drafter's config.json is not usable", where=path)
    base = raw.get("base_model")
    return DrafterSettings(path, config, num_beams, trained, source, tied, base if isinstance(base, dict) else None)


def _trained_draft_len(path: Path, fields: FieldReader) -> tuple[int | None, str]:
    """How many tokens ahead the drafter was trained, and where that is stated."""
    stated = fields.optional_size("draft_len")
    if stated is not None:
        return stated, "draft_len in the drafter's config.json"
    for name in (path.name, path.resolve().name):
        if match := DRAFT_LEN_IN_NAME.search(name):
            return int(match[1]), f"the drafter's directory name ({name})"
    return None, "not stated"


def draft_shape(
    drafter: DrafterSettings, *, num_beams: int | None, draft_len: int | None
) -> tuple[DraftShape, list[str], list[Problem]]:
    """The draft shape, where each number comes from, and what is wrong with it.

    What is asked for, else what the drafter says, else the default of NVIDIA's converter. It never exceeds what the
    drafter was trained for: beyond it the recurrence runs on states it has not seen, acceptance falls, and nothing says
    so at run time.
    """
    notes = []
    if num_beams is None:
        num_beams = drafter.num_beams or NVIDIA_NUM_BEAMS
        source = "the drafter's config.json" if drafter.num_beams else "the default of NVIDIA's converter"
        notes.append(f"num_beams {num_beams}: {source}")
    trained = drafter.trained_draft_len
    if draft_len is None:
        draft_len = trained or NVIDIA_DRAFT_LEN
        source = drafter.trained_draft_len_source if trained else "the default of NVIDIA's converter"
        notes.append(f"draft_len {draft_len}: {source}")
    if trained is None:
        notes.append(f"the drafter does not say how far ahead it was trained; draft_len {draft_len} is not checked")
    shape = DraftShape(num_beams, draft_len)
    return shape, notes, list(_shape_problems(shape, drafter))


def _shape_problems(shape: DraftShape, drafter: DrafterSettings) -> Iterator[Problem]:
    """Limits of every drafter, and of this one, that the shape exceeds."""
    for problem in shape.problems():
        yield replace(problem, where="--num-beams" if problem.what.startswith("num_beams") else "--draft-len")
    vocab_size, trained = drafter.config.vocab_size, drafter.trained_draft_len
    if vocab_size < shape.num_beams <= MAX_NUM_BEAMS:
        why = f"the vocabulary has {vocab_size} tokens"
        yield Problem(f"num_beams is {shape.num_beams}", "--num-beams", why, f"use {vocab_size} or fewer")
    if trained is not None and trained < shape.draft_len <= MAX_DRAFT_LEN:
        why = f"the drafter was trained for {trained} ({drafter.trained_draft_len_source})"
        remedy = f"use at most {trained}, or train a drafter for more"
        yield Problem(f"draft_len is {shape.draft_len}", "--draft-len", why, remedy)


def size_problems(drafter: DrafterSettings, base: CheckpointConfig) -> list[Problem]:
    """Sizes in which the drafter differs from the base model it is to draft for."""
    found, where, ours = [], str(drafter.path), drafter.config
    if ours.hidden_size != base.hidden_size:
        what = f"the drafter's hidden size is {ours.hidden_size}, the base's {base.hidden_size}"
        found.append(Problem(what, where, "the drafter reads the base's hidden states", RETRAIN))
    if ours.vocab_size != base.vocab_size:
        why, algo = "drafted tokens are the base's tokens", base.quant_algo or ""
        if "AWQ" in algo and base.vocab_size == -(-ours.vocab_size // 64) * 64:
            why = f"NVIDIA's exporter pads the vocabulary to a multiple of 64 for {algo}; drafts must stay inside it"
        what = f"the drafter's vocabulary is {ours.vocab_size}, the base's {base.vocab_size}"
        found.append(Problem(what, where, why, RETRAIN))
    return found
