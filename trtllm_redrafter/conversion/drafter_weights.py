"""The tensors of a drafter's file under TensorRT-LLM's names, whoever trained it; safetensors or `.pt`.

Names are a table of patterns. Nothing is loaded: tensors stay where they are until the conversion streams them.

Layouts, for K layers (all hold rnn_u.*, rnn_w.weight and maybe input_proj.* / input_projs.*):
    lm_head.{i}.linear.*   lm_head.{K}.weight       Apple
    lm_heads.{i}.linear.*  lm_heads.{K}.weight
    0.{i}.linear.*         0.{K}.weight             a bare nn.Sequential
    layers.{i}.linear.*    lm_head.weight           TensorRT-LLM
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

from trtllm_redrafter.checkpoint.names import DRAFTER, LM_HEAD
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile
from trtllm_redrafter.checkpoint.stored_tensor import STORED_DTYPES
from trtllm_redrafter.conversion.sources import LoadedTensor, Source
from trtllm_redrafter.errors import InputError, Problem
from trtllm_redrafter.paths import check_regular

WEIGHT_FILES = ("model.safetensors", "model.pt", "pytorch_model.bin")

FACTOR = "lm_head_factor.weight"
"""A small matrix; the LM head is the base's times it."""

_STEM = r"(?:lm_heads?|0)"
NAME_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"input_projs?(?:\.0)?\.(weight|bias)"), r"input_proj.\1"),
    (re.compile(_STEM + r"\.(\d+)\.linear\.(weight|bias)"), r"layers.\1.linear.\2"),
    (re.compile(r"layers\.(\d+)\.linear\.(weight|bias)"), r"layers.\1.linear.\2"),
    (re.compile(_STEM + r"\.(\d+)\.weight"), r"head.\1"),
    (re.compile(r"lm_head\.weight"), LM_HEAD),
    (re.compile(r"(rnn_u\.weight|rnn_u\.bias|rnn_w\.weight|lm_head_factor\.weight)"), r"\1"),
)
"""File name → TensorRT-LLM's, tried in order; `head.K` becomes the LM head when K is the number of layers."""

WRAPPERS = ("module", "_orig_mod")
"""Parts of a name that say how the drafter was run when it was saved, at any place in it."""


def weight_file(path: Path) -> Path:
    """The weights of the drafter in directory `path`."""
    for name in WEIGHT_FILES:
        if (path / name).exists():
            return path / name
    raise InputError(
        "the drafter has no weights",
        where=path,
        why=f"none of {', '.join(WEIGHT_FILES)} is there",
        remedy="check --drafter, or save the drafter as model.safetensors",
    )


def read_weights(path: Path, num_layers: int) -> tuple[dict[str, Source], list[Problem]]:
    """The tensors of a weight file by TensorRT-LLM's names; unknown ones and two for one name are problems."""
    tensors: Mapping[str, Source]
    tensors = SafetensorsFile.open(path) if path.suffix == ".safetensors" else _load_pickle(path)
    renamed: dict[str, Source] = {}
    problems = []
    for name, source in tensors.items():
        target = _target_name(_plain_name(name), num_layers)
        if target is None:
            what, why = f"tensor {name!r} has no place in a drafter", "leaving it out would change what it computes"
            problems.append(Problem(what, str(path), why, "check num_draft_layers in its config.json"))
        elif target in renamed:
            problems.append(Problem(f"tensor {name!r} is a second {target!r}", str(path), None, "remove one of them"))
        else:
            renamed[target] = source
    return renamed, problems


def _load_pickle(path: Path) -> dict[str, Source]:
    """A state dict saved by torch.save. `weights_only` keeps a pickle from running code."""
    import pickle

    import torch

    refusal = InputError(
        "the file is not a plain dictionary of tensors",
        where=path,
        why="pickles can hold code; only tensors are read from them",
        remedy="save it again with torch.save(model.state_dict(), ...) or, better, as safetensors",
    )
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols; what is read is checked below
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as e:
        raise refusal from e
    if not isinstance(value, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout is torch.strided and v.dtype in STORED_DTYPES
        for k, v in value.items()
    ):
        raise refusal
    return {name: LoadedTensor(name, path, tensor.detach()) for name, tensor in value.items()}


def _plain_name(name: str) -> str:
    """Without the wrappers of DistributedDataParallel (`module.`), torch.compile (`_orig_mod.`) and TensorRT-LLM."""
    inner = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return inner.removeprefix(DRAFTER)


def _target_name(name: str, num_layers: int) -> str | None:
    for pattern, template in NAME_PATTERNS:
        if match := pattern.fullmatch(name):
            target = match.expand(template)
            if not target.startswith("head."):
                return target
            return LM_HEAD if target == f"head.{num_layers}" else None
    return None
