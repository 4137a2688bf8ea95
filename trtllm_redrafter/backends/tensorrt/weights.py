"""The tensors that an engine's networks take as inputs, from the checkpoint.

Weights are inputs of the compiled networks and not part of them: an engine is megabytes, and every GPU's engine is run
on the same checkpoint. On the CPU a tensor is the checkpoint's file, mapped into memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_redrafter.backends.tensorrt.network import COSINE, DRAFT_HEAD, DRAFT_ROWS, SINE, TOKEN_IDS
from trtllm_redrafter.backends.torch.rope import rotary_tables
from trtllm_redrafter.checkpoint.draft_vocab import read_draft_vocab
from trtllm_redrafter.checkpoint.names import DRAFT_VOCAB_FILE, EMBEDDING, LM_HEAD
from trtllm_redrafter.checkpoint.reader import FP8_SCALE, Checkpoint


def draft_rows(checkpoint: Checkpoint, count: int) -> Tensor | None:
    """Ascending ids of the `count` most frequent tokens, if the checkpoint names them and drafts."""
    file = checkpoint.path / DRAFT_VOCAB_FILE
    if count < 1 or checkpoint.config.drafter is None or not file.exists():
        return None
    return read_draft_vocab(file, vocab_size=checkpoint.config.vocab_size)[:count].to(torch.int64).sort().values


def load_inputs(checkpoint: Checkpoint, rows: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    """Every weight that some network may ask for, on `device`, contiguous."""
    config = checkpoint.config
    made: dict[str, Tensor] = {}
    dtype: torch.dtype = getattr(torch, config.dtype)
    tables = rotary_tables(config.head_size, config.rotary_base, config.rotary_scaling, config.max_position_embeddings)
    made[COSINE], made[SINE] = (table.to(dtype) for table in tables)
    made[TOKEN_IDS] = torch.arange(config.vocab_size, dtype=torch.int32)
    if rows is not None:
        made[DRAFT_ROWS] = rows
        made[DRAFT_HEAD] = checkpoint.load(DRAFT_HEAD)[rows]
    for name in checkpoint.names():
        if name.endswith(FP8_SCALE):
            made[name] = checkpoint.load_stored(name).to(torch.float32).reshape(())
        elif name not in made:
            stored = checkpoint.load_stored(name)
            made[name] = stored if stored.dtype == torch.float8_e4m3fn else checkpoint.load(name)
    same = made[LM_HEAD].dtype == made[EMBEDDING].dtype
    if same and torch.equal(made[LM_HEAD], made[EMBEDDING]):
        made[LM_HEAD] = made[EMBEDDING]  # a tied head is kept once
    placed: dict[int, Tensor] = {}
    for name, tensor in made.items():
        at = tensor.data_ptr()
        if at not in placed:
            placed[at] = tensor.contiguous().to(device)
        made[name] = placed[at]
    return made
