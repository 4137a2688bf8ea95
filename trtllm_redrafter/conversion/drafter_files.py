"""Read a drafter directory, whoever trained it: Apple's, NVIDIA's or our own tensor names, safetensors or `.pt`.

Names are a table of patterns. Everything is brought to TensorRT-LLM's names (`layers.0.linear.weight`, ...) and
nothing is loaded: tensors stay where they are until the conversion streams them.

    drafter = DrafterFiles.open(Path("redrafter_vicuna-7b_n_5_lr_0.001_layers_2"))
    drafter.config, drafter.horizon            # DrafterConfig(...), 5

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.draft_vocab import draft_vocab_problems
from trtllm_redrafter.checkpoint.fields import FieldReader
from trtllm_redrafter.checkpoint.names import DRAFT_VOCAB_FILE, DRAFTER, LM_HEAD
from trtllm_redrafter.checkpoint.safetensors_io import STORED_DTYPES, SafetensorsFile
from trtllm_redrafter.conversion.drafter_checks import FACTOR, tensor_problems
from trtllm_redrafter.conversion.sources import LoadedTensor, Source
from trtllm_redrafter.errors import InputError, Problem, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.paths import check_regular
from trtllm_redrafter.redrafter.config import DrafterConfig

WEIGHT_FILES = ("model.safetensors", "model.pt", "pytorch_model.bin")

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

HORIZON_IN_NAME = re.compile(r"_n_(\d+)(?:_|$)")
"""Apple's trainer names its output `…_n_5_lr_…`: the drafter was trained on 5 tokens after the guaranteed one."""


@dataclass(frozen=True)
class DrafterFiles:
    """An opened drafter: sizes, training horizon, its tensors by TensorRT-LLM name, and what is wrong with them."""

    path: Path
    config: DrafterConfig
    horizon: int | None
    horizon_source: str
    num_beams: int | None
    tie_lm_head: bool
    tensors: Mapping[str, Source]
    factor: Source | None
    files: tuple[Path, ...]
    draft_vocab: Path | None
    base_identity: Mapping[str, Any]
    problems: tuple[Problem, ...]

    @classmethod
    def open(cls, path: Path) -> DrafterFiles:
        """Read config and headers.

        `InputError` when a file cannot be read; tensors that do not fit end up in `problems`, so that the caller can
        report them beside what does not fit the base.
        """
        if not path.is_dir():
            raise InputError("the drafter directory does not exist", where=path, remedy="check --drafter")
        raw = read_json(path / "config.json")
        fields = FieldReader(raw, path / "config.json")
        config = DrafterConfig(
            vocab_size=fields.size("vocab_size"),
            hidden_size=fields.size("hidden_size"),
            exit_dim=fields.size("exit_dim"),
            num_layers=fields.size("num_draft_layers", minimum=0),
            rnn=fields.flag("rnn", None),
        )
        horizon, horizon_source = _horizon(path, fields)
        beams, tied = fields.optional_size("num_beams"), fields.flag("tie_lm_head", False)
        raise_together(InputError, fields.problems, "the drafter's config.json is not usable", where=path)
        weights = _weight_file(path)
        named, problems = _rename(_load(weights), config, weights)
        factor = named.pop(FACTOR, None)
        problems += tensor_problems(config, named, factor, tied, weights)
        vocab = path / DRAFT_VOCAB_FILE if (path / DRAFT_VOCAB_FILE).exists() else None
        problems += [] if vocab is None else draft_vocab_problems(vocab, config.vocab_size)
        identity = raw.get("base_model")
        return cls(
            path=path,
            config=config,
            horizon=horizon,
            horizon_source=horizon_source,
            num_beams=beams,
            tie_lm_head=tied,
            tensors=named,
            factor=factor,
            files=tuple(p for p in (path / "config.json", weights, vocab) if p is not None),
            draft_vocab=vocab,
            base_identity=identity if isinstance(identity, dict) else {},
            problems=tuple(problems),
        )


def _horizon(path: Path, fields: FieldReader) -> tuple[int | None, str]:
    """How many tokens ahead the drafter was trained, and who says so."""
    stated = fields.optional_size("draft_len")
    if stated is not None:
        return stated, "draft_len in the drafter's config.json"
    for name in (path.name, path.resolve().name):
        if match := HORIZON_IN_NAME.search(name):
            return int(match[1]), f"the drafter's directory name ({name})"
    return None, "not stated"


def _weight_file(path: Path) -> Path:
    for name in WEIGHT_FILES:
        if (path / name).exists():
            return path / name
    raise InputError(
        "the drafter has no weights",
        where=path,
        why=f"none of {', '.join(WEIGHT_FILES)} is there",
        remedy="check --drafter, or save the drafter as model.safetensors",
    )


def _load(path: Path) -> Mapping[str, Source]:
    return SafetensorsFile.open(path) if path.suffix == ".safetensors" else _load_pickle(path)


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


def _rename(
    tensors: Mapping[str, Source], config: DrafterConfig, path: Path
) -> tuple[dict[str, Source], list[Problem]]:
    """TensorRT-LLM's names; unknown tensors and two for one name are problems."""
    renamed: dict[str, Source] = {}
    problems = []
    for name, source in tensors.items():
        target = _target_name(_plain_name(name), config.num_layers)
        if target is None:
            what, why = f"tensor {name!r} has no place in a drafter", "leaving it out would change what it computes"
            problems.append(Problem(what, str(path), why, "check num_draft_layers in its config.json"))
        elif target in renamed:
            problems.append(Problem(f"tensor {name!r} is a second {target!r}", str(path), None, "remove one of them"))
        else:
            renamed[target] = source
    return renamed, problems


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
