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
from trtllm_redrafter.checkpoint.safetensors_io import read_header
from trtllm_redrafter.errors import BackendError, InputError
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.memory import is_out_of_memory
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
        model = _load(path, DTYPES[dtype])
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


def _load(path: Path, dtype: torch.dtype) -> Any:
    """The model through transformers; `InputError` for whatever it says of files it cannot use.

    A tensor that is missing would be filled with random numbers, with no more than a warning.
    """
    from transformers import AutoModelForCausalLM

    for file in sorted(path.glob("*.safetensors")):
        read_header(file)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(path, f"{type(error).__name__}: {str(error)[:300]}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise _unusable(path, f"its files lack {', '.join(missing[:3])}" + (" and others" if len(missing) > 3 else ""))
    return model


def _unusable(path: Path, why: str) -> InputError:
    remedy = "check it with `trtllm-redrafter convert --base … --dry-run`, or download it again"
    return InputError("the base model cannot be loaded", where=path, why=why, remedy=remedy)


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
