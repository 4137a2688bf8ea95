"""Load any drafter directory that conversion reads, ours or another trainer's, for evaluation.

Names, `.pt` files and config.json are `convert`'s business (`DrafterFiles`); here its tensors go to their places in a
`TrainableDrafter`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trtllm_redrafter.conversion.drafter import DrafterFiles
from trtllm_redrafter.conversion.sources import Source
from trtllm_redrafter.errors import InputError, raise_together
from trtllm_redrafter.training.export import load_weights, weight_names
from trtllm_redrafter.training.model import DrafterSpec, HeadKind, TrainableDrafter

HEADS = {"lm_head.weight": "full_head.weight", "lm_head_factor.weight": "factor.weight"}
"""TensorRT-LLM's name → where it lies in `TrainableDrafter`; all others are below `core`."""


def read_drafter(folder: Path, longest: int) -> TrainableDrafter:
    """The drafter in float32. One that does not say how far ahead it was trained is taken to reach `longest`."""
    drafter = DrafterFiles.open(folder)
    raise_together(InputError, drafter.problems, "the drafter cannot be evaluated", where=folder)
    sources = dict(drafter.tensors)
    if drafter.factor is not None:
        sources["lm_head_factor.weight"] = drafter.factor
    found = {HEADS.get(name, f"core.{name}"): _read(source) for name, source in sources.items()}
    spec = DrafterSpec(drafter.config, _head(drafter), drafter.trained_draft_len or longest)
    return load_weights(spec, {name: found[path] for name, path in weight_names(spec).items()})


def _head(drafter: DrafterFiles) -> HeadKind:
    if not drafter.tie_lm_head:
        return HeadKind.FULL
    return HeadKind.TIED if drafter.factor is None else HeadKind.FACTOR


def _read(source: Source) -> Tensor:
    return source.read(0, source.shape[0] if source.shape else 1).to(torch.float32)
