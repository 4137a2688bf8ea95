"""Recognise a drafter LM head that is the base model's head times a small matrix.

Trainers tie the two to keep drafters small; the checkpoint format knows only the product, [V, exit_dim]. With
exit_dim twice the hidden size that product is twice as wide as the base's head, and reading it is most of a drafting
round's cost. The small matrix is found again by least squares, once, when an engine is built, and stored beside the
checkpoint. It changes nothing but which bytes a draft reads: drafts decide speed, never output.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile, save_tensors
from trtllm_redrafter.errors import InputError

FACTOR_FILE = "draft_head_factor.safetensors"
_ROWS = 8192
"""Rows of the vocabulary that the matrix is fitted on, and as many to test it."""

_TOLERANCE = 0.01
"""Largest relative error that counts as equal: bfloat16 rounds the product by 0.002 to 0.004."""


@dataclass(frozen=True)
class LowRankHead:
    """The drafter's LM head as base_head [V, H] times factor [H, exit_dim]."""

    base_head: Tensor
    factor: Tensor


def find_factor(checkpoint: Checkpoint) -> Tensor | None:
    """[H, exit_dim] when the drafter's head is such a product and reading the two is cheaper, else None."""
    config = checkpoint.config
    if config.drafter is None or config.drafter.exit_dim <= config.hidden_size:
        return None
    names = checkpoint.names()
    base = checkpoint.load("lm_head.weight" if "lm_head.weight" in names else "transformer.vocab_embedding.weight")
    product = checkpoint.load("drafter.lm_head.weight")
    order = torch.randperm(len(base), generator=torch.Generator().manual_seed(0))
    count = min(_ROWS, len(order) // 2)
    fitted, tested = order[:count], order[-count:]
    if count <= config.hidden_size:
        return None  # any head would fit
    try:
        factor: Tensor = torch.linalg.lstsq(base[fitted].float(), product[fitted].float()).solution
    except RuntimeError:  # LAPACK failed, for example on weights near the limits of float32
        return None
    error = base[tested].float() @ factor - product[tested].float()
    return factor if error.norm() < _TOLERANCE * product[tested].float().norm() else None


def save_factor(factor: Tensor, folder: Path) -> None:
    save_tensors(folder / FACTOR_FILE, {"factor": factor.to(torch.bfloat16).contiguous()})


def load_factor(folder: Path, base_head: Tensor, exit_dim: int | None = None) -> LowRankHead | None:
    """The factor that `build` found, if any; `InputError` when it does not fit the two heads."""
    path = folder / FACTOR_FILE
    if not path.exists():
        return None
    info, hidden = SafetensorsFile.open(path).get("factor"), base_head.shape[1]
    fits = info is not None and info.dtype == "BF16" and len(info.shape) == 2 and info.shape[0] == hidden
    if info is None or not fits or exit_dim not in (None, info.shape[1]):
        found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
        why = f"`factor` is {found}, BF16 [{hidden}, {exit_dim or 'exit_dim'}] is needed"
        raise InputError("the factor of the drafter's head does not fit", where=path, why=why, remedy="build it again")
    return LowRankHead(base_head, info.load().to(base_head.device))
