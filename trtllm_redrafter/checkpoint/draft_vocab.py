"""`draft_vocab.safetensors`: the token ids that a reduced draft head has rows for, most frequent first.

The trainer writes it, `convert` copies it, the torch backend and `evaluate` read it. It affects what is drafted and
never what is generated, but an id outside the vocabulary would read past the end of the LM head.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile
from trtllm_redrafter.errors import InputError, Problem


def read_draft_vocab(path: Path, vocab_size: int) -> Tensor:
    """`token_ids` [n] int64: distinct and inside the vocabulary, else `InputError`."""
    stored = SafetensorsFile.open(path).get("token_ids")
    if stored is None or stored.dtype != "I32" or len(stored.shape) != 1 or stored.shape[0] == 0:
        raise _refusal("the file has no int32 list `token_ids`", path)
    ids = stored.load().to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        why = f"they run from {low} to {high}, the vocabulary has {vocab_size}"
        raise _refusal("`token_ids` are outside the vocabulary", path, why)
    if len(set(ids.tolist())) != ids.numel():
        raise _refusal("`token_ids` has a token twice", path)
    return ids


def draft_vocab_problems(path: Path, vocab_size: int) -> list[Problem]:
    """What `read_draft_vocab` would refuse, to be reported with other problems. An unreadable file raises."""
    try:
        read_draft_vocab(path, vocab_size)
    except InputError as error:
        return [error.problem]
    return []


def _refusal(what: str, path: Path, why: str | None = None) -> InputError:
    return InputError(what, where=path, why=why, remedy="write the file again, or remove it: it changes speed only")
