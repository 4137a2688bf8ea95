"""Distinguish base models of equal sizes by their weights, without reading all of them.

The first bytes of every tensor are hashed with its name, dtype and shape, so that the hash does not depend on how the
model is split into files. Training writes it into the drafter, and `convert` compares it with its base model's. It
detects changes in the first rows of any tensor: every fine-tune, but not a single edited weight.

    weights_sample(model.tensors)      # hex SHA-256
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from trtllm_redrafter.base_models.hf_model import LocatedTensor, locate_tensors
from trtllm_redrafter.errors import RedrafterError

SAMPLE_BYTES = 4096
"""Bytes per tensor: one page, about two thousand values."""


def weights_sample(tensors: Mapping[str, LocatedTensor]) -> str:
    """Hex SHA-256 over every tensor's name, dtype, shape and first `SAMPLE_BYTES` bytes."""
    digest = hashlib.sha256()
    opened: dict[Path, int] = {}
    try:
        for name, tensor in sorted(tensors.items()):
            info = tensor.info
            if tensor.path not in opened:
                opened[tensor.path] = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
            count = min(SAMPLE_BYTES, info.end - info.begin)
            digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
            digest.update(os.pread(opened[tensor.path], count, info.begin))
    finally:
        for file in opened.values():
            os.close(file)
    return digest.hexdigest()


def sample_of(path: Path) -> str | None:
    """`weights_sample` of a model directory; None if its weights are not safetensors."""
    try:
        return weights_sample(locate_tensors(path)[1])
    except RedrafterError:
        return None
