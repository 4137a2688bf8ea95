"""Checks of options, and of base and drafter against each other, before anything is written."""

from __future__ import annotations

from trtllm_redrafter.checkpoint.config import DTYPES
from trtllm_redrafter.conversion.base import Base
from trtllm_redrafter.conversion.drafter_files import DrafterFiles
from trtllm_redrafter.conversion.options import AUTO_DTYPE, LM_HEADS, ConvertOptions
from trtllm_redrafter.errors import Problem, RedrafterError, UsageError
from trtllm_redrafter.fsio import overlaps


def option_problems(options: ConvertOptions) -> tuple[type[RedrafterError], list[Problem]]:
    """Options that cannot be meant, whatever the files say."""
    found = []
    if options.tp_size < 1:
        found.append(Problem(f"tp_size is {options.tp_size}", "--tp-size", None, "use 1 or more"))
    if options.workers < 1:
        found.append(Problem(f"workers is {options.workers}", "--workers", None, "use 1 or more"))
    if options.dtype not in (AUTO_DTYPE, *DTYPES):
        remedy = f"use {AUTO_DTYPE}, {', '.join(DTYPES)}"
        found.append(Problem(f"dtype is {options.dtype!r}", "--dtype", None, remedy))
    if options.lm_head not in LM_HEADS:
        found.append(Problem(f"lm_head is {options.lm_head!r}", "--lm-head", None, f"use {', '.join(LM_HEADS)}"))
    if options.drafter is None:
        for flag, value in (("--num-beams", options.num_beams), ("--draft-len", options.draft_len)):
            if value is not None:
                why = "without a drafter nothing is drafted"
                found.append(Problem(f"{flag} {value} has no meaning here", flag, why, "pass --drafter, or drop it"))
    for role, path in (("base", options.base), ("drafter", options.drafter)):
        if path is not None and overlaps(options.output, path):
            what = f"the output overlaps the {role} directory"
            why = "replacing the output would delete the input, or mix with it"
            found.append(Problem(what, str(options.output), why, "choose another --output"))
    return UsageError, found


def pair_problems(base: Base, drafter: DrafterFiles) -> list[Problem]:
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
