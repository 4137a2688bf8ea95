"""The config of the checkpoint that a recipe would produce, from the files that already exist.

The recipe's checkpoint is used if it exists; otherwise the config that converting base and drafter would write, from
their config files alone. A base model that is not downloaded is described by `configs/models/NAME.json`; a drafter that
is not trained is assumed to have the shape of Apple's published ones. `notes` list all assumptions.

    planned = planned_model(recipe)
    planned.config.draft_shape, planned.notes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.base_models.hf_config import parse_hf_config
from trtllm_redrafter.checkpoint.config import CheckpointConfig, read_checkpoint_config
from trtllm_redrafter.checkpoint.quantization import complete_excludes
from trtllm_redrafter.errors import InputError, MismatchError, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape

ASSUMED_LAYERS = 2
"""Residual blocks of Apple's published drafters; their exit_dim is twice the hidden size."""


@dataclass(frozen=True)
class ModelSource:
    """The part of a recipe that determines a checkpoint's config. `num_beams`, `draft_len` None: the drafter's own."""

    base: Path | None
    drafter: Path | None
    checkpoint: Path | None
    dtype: str
    tp_size: int
    num_beams: int | None
    draft_len: int | None
    greedy: bool
    parallel_embedding: bool
    fallback_shape: DraftShape
    """Used if neither recipe nor drafter has a shape, as `convert` does."""


@dataclass(frozen=True)
class PlannedModel:
    """`notes` tell the config's source and all assumptions."""

    config: CheckpointConfig
    notes: tuple[str, ...]


def planned_model(source: ModelSource) -> PlannedModel:
    """Read or assume everything a plan needs; `InputError` if there is nothing to read."""
    if source.checkpoint is not None and (source.checkpoint / "config.json").is_file():
        return PlannedModel(read_checkpoint_config(source.checkpoint), (f"model: checkpoint {source.checkpoint}",))
    if source.base is None:
        raise InputError("there is nothing to plan for", why="neither base nor checkpoint", remedy="set `base`")
    config, notes = _base_config(source.base)
    config = replace(
        config,
        dtype=config.dtype if source.dtype == "auto" else source.dtype,
        tp_size=source.tp_size,
        use_parallel_embedding=source.parallel_embedding,
    )
    if source.drafter is None:
        return PlannedModel(config, (*notes, "no drafter: autoregressive"))
    drafter, shape, drafter_notes = _drafter(source, config)
    quantization = dict(config.quantization)
    if quantization.get("quant_algo"):
        quantization["exclude_modules"] = complete_excludes(quantization.get("exclude_modules"))
    config = replace(config.with_drafter(drafter, shape, greedy=source.greedy), quantization=quantization)
    return PlannedModel(config, (*notes, *drafter_notes))


def _base_config(base: Path) -> tuple[CheckpointConfig, tuple[str, ...]]:
    path, note = base / "config.json", f"model: {base}"
    if not path.is_file():
        found = _description(base.name)
        if found is None:
            raise InputError(
                "the base model is not there, and configs/models/ has no description of it",
                where=base,
                remedy=f"download at least its config.json, or write configs/models/{base.name.lower()}.json",
            )
        path, note = found, f"model: {base} is not there yet, sizes are those of configs/models/{found.name}"
    raw = read_json(path)
    if "architecture" in raw:
        return CheckpointConfig.from_dict(raw, where=path), (note,)
    parsed = parse_hf_config(raw, where=path)
    raise_together(InputError, parsed.problems, "the base model cannot be converted", where=path)
    assert parsed.config is not None
    return parsed.config, (note, *parsed.notes)


def _description(name: str) -> Path | None:
    package = Path(__file__).resolve().parent.parent
    places = [package.parent / "configs" / "models", package / "configs" / "models", Path("configs/models")]
    found = [place / f"{name.lower()}.json" for place in places if (place / f"{name.lower()}.json").is_file()]
    return found[0] if found else None


def _drafter(source: ModelSource, base: CheckpointConfig) -> tuple[DrafterConfig, DraftShape, list[str]]:
    assert source.drafter is not None
    path, notes = source.drafter / "config.json", []
    raw: Mapping[str, Any] = {}
    if path.is_file():
        raw = read_json(path)
        notes.append(f"drafter: {source.drafter}")
    else:
        assumed = f"{ASSUMED_LAYERS} layers, exit_dim {2 * base.hidden_size}, RNN"
        notes.append(f"drafter: {source.drafter} is not there yet, assumed {assumed}")
    drafter = DrafterConfig(
        vocab_size=base.vocab_size,
        hidden_size=base.hidden_size,
        exit_dim=_size(raw, "exit_dim", 2 * base.hidden_size, path),
        num_layers=_size(raw, "num_draft_layers", ASSUMED_LAYERS, path),
        rnn=bool(raw.get("rnn", True)),
    )
    fallback = source.fallback_shape
    beams = source.num_beams or _size(raw, "num_beams", fallback.num_beams, path)
    trained = _size(raw, "draft_len", fallback.draft_len, path)
    length = source.draft_len or trained
    if "draft_len" in raw and length > trained:
        remedy = f"use at most {trained}, or train a drafter for more"
        raise MismatchError(f"draft_len is {length}, the drafter was trained for {trained}", where=path, remedy=remedy)
    return drafter, DraftShape(beams, length), notes


def _size(raw: Mapping[str, Any], key: str, default: int, where: Path) -> int:
    value = raw.get(key, default)
    if type(value) is not int or value < 0:
        raise InputError(f"{key} is {value!r}", where=where, remedy="it must be a whole number")
    return value
