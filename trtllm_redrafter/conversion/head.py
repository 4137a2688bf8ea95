"""Which LM head a base model has, where its config.json and its weights do not say the same.

`tie_word_embeddings: true` means that the head is the embedding. Some files hold another, trained `lm_head.weight` all
the same: transformers 4 drops it, transformers 5 takes it. By default the config decides, and the conversion says so;
`--lm-head file` takes the trained one.

    config, notes = chosen_head(model, "auto")
"""

from __future__ import annotations

from dataclasses import replace

import torch

from trtllm_redrafter.base_models.hf_model import HFModel, check_tensors
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import EMBEDDING, LM_HEAD, hf_names
from trtllm_redrafter.checkpoint.stored_tensor import StoredTensor
from trtllm_redrafter.conversion.options import EMBEDDING_HEAD, FILE_HEAD
from trtllm_redrafter.errors import InputError, MismatchError, raise_together

HF_EMBEDDING, HF_LM_HEAD = hf_names(EMBEDDING)[0], hf_names(LM_HEAD)[0]
_ROWS = 1024
"""Rows compared at a time."""


def chosen_head(model: HFModel, choice: str) -> tuple[CheckpointConfig, tuple[str, ...]]:
    """The model's config with the head that was chosen, and what people should know."""
    config = model.config
    if choice == FILE_HEAD and config.tie_word_embeddings:
        config = replace(config, tie_word_embeddings=False)
        raise_together(InputError, check_tensors(config, model.tensors, model.path), "the file has no such LM head",
                       where=model.path, remedy="leave --lm-head out")  # fmt: skip
        return config, (f"the LM head is the file's {HF_LM_HEAD}, although config.json ties it to the embedding",)
    if choice == EMBEDDING_HEAD and not config.tie_word_embeddings:
        why = "tie_word_embeddings is not true in its config.json"
        what = "the model's LM head is not its embedding"
        raise MismatchError(what, where="--lm-head embedding", why=why, remedy="leave --lm-head out")
    stored = model.tensors.get(HF_LM_HEAD)
    if choice == EMBEDDING_HEAD or not config.tie_word_embeddings or stored is None:
        return config, ()
    if _same(model.tensors[HF_EMBEDDING], stored):
        return config, ()
    return config, (
        f"config.json ties the LM head to the embedding, but the file has another {HF_LM_HEAD}: the embedding is used, "
        "as in transformers 4; pass --lm-head file for the file's (transformers 5 takes it; train and evaluate do "
        "when tie_word_embeddings is false), or --lm-head embedding to confirm",
    )


def takes_file_head(manifest: Manifest | None) -> bool:
    """Was this checkpoint converted with `--lm-head file`?"""
    return manifest is not None and manifest.options.get("lm_head") == FILE_HEAD


def _same(embedding: StoredTensor, head: StoredTensor) -> bool:
    if embedding.shape != head.shape:
        return False
    rows = embedding.shape[0]
    for start in range(0, rows, _ROWS):
        a, b = (each.read(start, min(start + _ROWS, rows)) for each in (embedding, head))
        if not torch.equal(a.to(torch.float32), b.to(torch.float32)):
            return False
    return True
