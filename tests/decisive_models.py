"""A tiny model whose greedy tokens hardly depend on rounding, with a drafter that is often right; nothing is trained.

Of a random model's tokens, bfloat16 decides one in twenty, and a random drafter is almost never right: on such a pair a
correct engine fails the parity gate. Here the tokens form one cycle. The LM head's row of a token is its predecessor's
embedding, so its successor's logit stands out, and the layers move the hidden state just enough that the context
decides otherwise for one token in nine: a wrong layer shows, rounding does not. The drafter knows the cycle only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engines import convert_pair
from tests.tiny_models import write_base, write_drafter

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 512}  # fmt: skip
FIRST = 3
"""The tokens before are unknown, begin and end; nothing is followed by them."""

LAYERS = 0.015
"""Factor of the layers' output projections. At 0.01 the cycle hides a wrong layer, at 0.03 rounding decides tokens."""


def successors(vocab_size: int) -> Tensor:
    """[V]: one cycle through all tokens from `FIRST` on; the tokens before it lead into it."""
    order = torch.randperm(vocab_size - FIRST, generator=torch.Generator().manual_seed(5)) + FIRST
    found = torch.full((vocab_size,), int(order[0]))
    found[order] = order.roll(-1)
    return found


def write_decisive_checkpoint(
    folder: Path,
    *,
    drafter: bool = True,
    dtype: str = "bfloat16",
    tp_size: int = 1,
    fault: Callable[[dict[str, Tensor]], None] | None = None,
) -> Path:
    """`folder/checkpoint`, 3 beams x 3 tokens; `fault` edits the base's tensors, to plant what a test must find."""
    write_base(folder / "base", **SIZES)
    _edit_base(folder / "base" / "model.safetensors", fault)
    if drafter:
        hidden, vocab = SIZES["hidden_size"], SIZES["vocab_size"]
        write_drafter(folder / "drafter", hidden_size=hidden, exit_dim=2 * hidden, vocab_size=vocab)
        _edit_drafter(folder)
    return convert_pair(folder, drafter=drafter, dtype=dtype, tp_size=tp_size, num_beams=3, draft_len=3)


def _edit_base(file: Path, fault: Callable[[dict[str, Tensor]], None] | None) -> None:
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= LAYERS
    embedding = tensors["model.embed_tokens.weight"]
    head = torch.zeros_like(tensors["lm_head.weight"])
    follows = successors(len(embedding))[FIRST:]
    head[follows] = embedding[FIRST:]
    tensors["lm_head.weight"] = head
    if fault is not None:
        fault(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _edit_drafter(folder: Path) -> None:
    """State: the last token's embedding where it is positive. Head: its successor. The context is not looked at."""
    file = folder / "drafter" / "model.safetensors"
    embedding = load_file(folder / "base" / "model.safetensors")["model.embed_tokens.weight"]
    tensors = load_file(file)
    hidden = embedding.shape[1]
    for name, tensor in tensors.items():
        if "rnn_w" in name:
            tensors[name] = 20.0 * torch.eye(hidden)
        elif "rnn_u" in name or ".linear" in name:
            tensors[name] = torch.zeros_like(tensor)
        elif tensor.shape == (len(embedding), 2 * hidden):
            tensors[name] = torch.zeros_like(tensor)
            tensors[name][successors(len(embedding))[FIRST:], hidden:] = embedding[FIRST:].clamp(min=0)
    save_file(tensors, file, metadata={"format": "pt"})
