"""The base model as training sees it: hidden states of given tokens, its two matrices, and who it is.

It runs through transformers, in the dtype its checkpoint has or another, and is never trained. Batches are padded on
the right and need no mask: in a causal model nothing before the padding can see it. (Masks made from `token != pad`
are wrong wherever the padding token also ends a turn.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.base_models.tokenizer import eos_token_ids, tokenizer_sha256
from trtllm_redrafter.errors import BackendError, InputError
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.training.export import BaseIdentity

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FrozenBase:
    """A loaded base model. `hidden()` gives states after the final norm, the drafter's context."""

    def __init__(self, model: Any, path: Path) -> None:
        self._model = model
        self.path = path
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        self.head: Tensor = model.get_output_embeddings().weight.detach()
        self.eos = eos_token_ids(path, read_json(path / "config.json"))

    @classmethod
    def load(cls, path: Path, *, device: str, dtype: str) -> FrozenBase:
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("no CUDA device is here", where="device", remedy="use cpu")
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], local_files_only=True)
        return cls(model.to(device).eval().requires_grad_(False), path)

    @property
    def model(self) -> Any:
        return self._model

    @torch.no_grad()
    def hidden(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """States [S, H] of each text, computed as one batch."""
        width = max(len(t) for t in texts)
        tokens = torch.tensor([[*t, *[0] * (width - len(t))] for t in texts], device=self.head.device)
        states = self._model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        return [states[i, : len(t)] for i, t in enumerate(texts)]


def base_identity(path: Path) -> BaseIdentity:
    """Read from the directory's files; the model itself need not be loaded."""
    config = read_json(path / "config.json")
    try:
        hidden_size, vocab_size = int(config["hidden_size"]), int(config["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "hidden_size or vocab_size is missing", where=path / "config.json", remedy="pass a Hugging Face model"
        ) from error
    return BaseIdentity(path.resolve().name, hidden_size, vocab_size, tokenizer_sha256(path))


def load_tokenizer(path: Path) -> Any:
    if tokenizer_sha256(path) is None:
        raise InputError("the model has no tokenizer", where=path, remedy="put its tokenizer files into the directory")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)
