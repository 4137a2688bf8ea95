"""How many beams and how many tokens each: from the options, else from the drafter, else NVIDIA's converter.

The draft length never exceeds what the drafter was trained for: beyond it the recurrence runs on states it has not
seen, acceptance falls, and nothing says so at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_redrafter.conversion.drafter_files import DrafterFiles
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.redrafter.config import (
    MAX_DRAFT_LEN,
    MAX_NUM_BEAMS,
    NVIDIA_DRAFT_LEN,
    NVIDIA_NUM_BEAMS,
    DraftShape,
)


@dataclass(frozen=True)
class ResolvedShape:
    """The shape that is written, and where each number came from."""

    shape: DraftShape
    notes: tuple[str, ...]


def resolve_shape(options: ConvertOptions, drafter: DrafterFiles) -> tuple[ResolvedShape, list[Problem]]:
    """The draft shape and all that is wrong with it."""
    notes = []
    beams, draft_len = options.num_beams, options.draft_len
    if beams is None:
        beams = drafter.num_beams or NVIDIA_NUM_BEAMS
        source = "the drafter's config.json" if drafter.num_beams else "the default of NVIDIA's converter"
        notes.append(f"num_beams {beams}: {source}")
    if draft_len is None:
        draft_len = drafter.horizon or NVIDIA_DRAFT_LEN
        source = drafter.horizon_source if drafter.horizon else "the default of NVIDIA's converter"
        notes.append(f"draft_len {draft_len}: {source}")
    if drafter.horizon is None:
        notes.append(f"the drafter does not say how far ahead it was trained; draft_len {draft_len} is not checked")
    return ResolvedShape(DraftShape(beams, draft_len), tuple(notes)), _problems(beams, draft_len, drafter)


def _problems(beams: int, draft_len: int, drafter: DrafterFiles) -> list[Problem]:
    found = []
    highest = min(MAX_NUM_BEAMS, drafter.config.vocab_size)
    if not 1 <= beams <= highest:
        why = f"beyond the drafter's top {MAX_NUM_BEAMS} tokens, TensorRT-LLM accepts drafts without a test"
        found.append(Problem(f"num_beams is {beams}", "--num-beams", why, f"use 1 to {highest}"))
    if draft_len < 1:
        found.append(Problem(f"draft_len is {draft_len}", "--draft-len", None, "draft at least one token"))
    elif drafter.horizon is not None and draft_len > drafter.horizon:
        why = f"the drafter was trained for {drafter.horizon} ({drafter.horizon_source})"
        remedy = f"use at most {drafter.horizon}, or train a drafter for more"
        found.append(Problem(f"draft_len is {draft_len}", "--draft-len", why, remedy))
    elif draft_len > MAX_DRAFT_LEN:
        why = "memory for every drafted token is reserved up front"
        found.append(Problem(f"draft_len is {draft_len}", "--draft-len", why, f"use at most {MAX_DRAFT_LEN}"))
    return found
