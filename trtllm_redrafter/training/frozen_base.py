"""The base model as training sees it: hidden states of given tokens, its two matrices, and its identity.

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

from trtllm_redrafter.backends.torch.weights import DTYPES
from trtllm_redrafter.base_models.hf_config import one_form
from trtllm_redrafter.base_models.hf_model import sample_of
from trtllm_redrafter.base_models.tokenizer import tokenizer_sha256
from trtllm_redrafter.base_models.tokenizer_setup import TokenizerSetup, tokenizer_setup
from trtllm_redrafter.base_models.transformers_model import load_model
from trtllm_redrafter.errors import BackendError, InputError, Problem, not_finite, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.training.drafter_files import BaseIdentity


def dtype_problems(dtype: str) -> list[Problem]:
    """A base model's config.json may name a dtype that is not supported here."""
    return [] if dtype in DTYPES else [Problem(f"dtype is {dtype!r}", remedy=f"use one of {', '.join(DTYPES)}")]


class FrozenBase:
    """A loaded base model. `hidden()` gives states after the final norm, the drafter's context."""

    def __init__(self, model: Any, path: Path) -> None:
        self._model = model
        self.path = path
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        self.head: Tensor = model.get_output_embeddings().weight.detach()
        self.eos = base_text(path).end_token_ids

    @classmethod
    def load(cls, path: Path, *, device: str, dtype: str) -> FrozenBase:
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("no CUDA device is here", where="device", remedy="use cpu")
        model = load_model(path, dtype=DTYPES[dtype])
        return cls(model.to(device).requires_grad_(False), path)

    @property
    def model(self) -> Any:
        return self._model

    @torch.no_grad()
    def hidden(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """States [S, H] of each text, computed as one batch. Raises `NumericalError` where they are not finite."""
        width = max(len(t) for t in texts)
        tokens = torch.tensor([[*t, *[0] * (width - len(t))] for t in texts], device=self.head.device)
        states = self._model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        if not bool(states.isfinite().all()):
            raise not_finite("the base model's hidden states", states.dtype, where=self.path)
        return [states[i, : len(t)] for i, t in enumerate(texts)]


def base_identity(path: Path) -> BaseIdentity:
    """Read from the directory's files; the model itself need not be loaded."""
    fields, contradictions = one_form(read_json(path / "config.json"), where=path / "config.json")
    raise_together(InputError, contradictions, "config.json contradicts itself", where=path)
    try:
        hidden_size, vocab_size = int(fields["hidden_size"]), int(fields["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "hidden_size or vocab_size is missing", where=path / "config.json", remedy="pass a Hugging Face model"
        ) from error
    return BaseIdentity(path.resolve().name, hidden_size, vocab_size, tokenizer_sha256(path), sample_of(path))


def base_text(path: Path) -> TokenizerSetup:
    """The base's tokenizer, checked against its embedding, and its end tokens."""
    vocab_size = read_json(path / "config.json").get("vocab_size")
    if type(vocab_size) is not int:
        raise InputError("vocab_size is missing", where=path / "config.json", remedy="pass a Hugging Face model")
    return tokenizer_setup(path, vocab_size=vocab_size, remedy="download the base's tokenizer files again")


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of the base; `InputError` when it has none, or one that cannot be used."""
    return with_tokenizer(base_text(path), path)


def with_tokenizer(text: TokenizerSetup, path: Path) -> Any:
    """The tokenizer of `text`; `InputError` when there is none."""
    if text.tokenizer is None:
        raise InputError("the model has no tokenizer", where=path, remedy="put its tokenizer files into the directory")
    return text.tokenizer
