"""Model, drafter, checkpoint or engine: which of them a directory is, by the keys of its config.json.

kind_at(Path("engine/checkpoint")) is Kind.CHECKPOINT
raise wrong_kind(path, config, Kind.CHECKPOINT)         # this is an engine, not a checkpoint
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import read_json


class Kind(enum.Enum):
    """Values are used in messages."""

    BASE_MODEL = "a Hugging Face model"
    DRAFTER = "a drafter"
    CHECKPOINT = "a checkpoint"
    TORCH_ENGINE = "an engine of the torch backend"
    TENSORRT_ENGINE = "a TensorRT-LLM engine"
    STEP_ENGINE = "an engine of the tensorrt backend"


ENGINES = (Kind.TORCH_ENGINE, Kind.TENSORRT_ENGINE, Kind.STEP_ENGINE)

COMPILED = (Kind.TENSORRT_ENGINE, Kind.STEP_ENGINE)
"""Engines whose files hold plans of a compiler, and no tensors."""

_KEYS: tuple[tuple[str, Kind], ...] = (
    ("pretrained_config", Kind.TENSORRT_ENGINE),
    ("networks", Kind.STEP_ENGINE),
    ("backend", Kind.TORCH_ENGINE),
    ("architecture", Kind.CHECKPOINT),
    ("exit_dim", Kind.DRAFTER),
    ("architectures", Kind.BASE_MODEL),
    ("model_type", Kind.BASE_MODEL),
)
"""Keys of config.json that only one kind has; the first one present decides."""

_ANY = "a model, drafter, checkpoint or engine"

_REMEDIES: Mapping[tuple[Kind, Kind], str] = {
    (Kind.TORCH_ENGINE, Kind.CHECKPOINT): "pass the checkpoint it was built from",
    (Kind.TENSORRT_ENGINE, Kind.CHECKPOINT): "pass the checkpoint it was built from",
    (Kind.STEP_ENGINE, Kind.CHECKPOINT): "pass the checkpoint it was built from",
    (Kind.DRAFTER, Kind.CHECKPOINT): "run `trtllm-redrafter convert --base … --drafter` on it",
    (Kind.BASE_MODEL, Kind.CHECKPOINT): "run `trtllm-redrafter convert --base` on it",
    (Kind.CHECKPOINT, Kind.TORCH_ENGINE): "run `trtllm-redrafter build --checkpoint` on it, and pass its output",
}
"""By the kind that was given and the kind that is needed."""


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """The kind of a directory with this config.json; None for anything else."""
    return next((kind for key, kind in _KEYS if key in config), None)


def kind_at(path: Path) -> Kind | None:
    """The kind of directory `path`; `InputError` without a readable config.json."""
    return kind_of(read_json(path / "config.json"))


def wrong_kind(path: Path, config: Mapping[str, Any], wanted: Kind | None) -> InputError:
    """The error for a directory that is not `wanted`: either kind of engine means any engine, None any kind."""
    found = kind_of(config)
    called = _ANY if wanted is None else "an engine" if wanted in ENGINES else wanted.value
    if found is None or wanted is None:
        keys = ", ".join(f"`{key}`" for key, _ in _KEYS)
        why = f"its config.json has none of the keys {keys}"
        return InputError(f"this is not {called}", where=path, why=why, remedy="check the path")
    is_a = "an engine" if found in ENGINES else found.value
    why = f"its config.json has the key `{next(key for key, _ in _KEYS if key in config)}`"
    remedy = _REMEDIES.get((found, wanted), "check the path")
    return InputError(f"this is {is_a}, not {called}", where=path, why=why, remedy=remedy)
