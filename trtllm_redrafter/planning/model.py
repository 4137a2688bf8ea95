"""The config of the checkpoint that a conversion would write, from the config files that already exist.

A base model that is not downloaded is described by `configs/models/NAME.json`; a drafter that is not trained is assumed
to have the sizes of Apple's published ones. `notes` list all assumptions.

    planned = planned_model(ConvertOptions(base=..., drafter=..., ...))
    planned.config.draft_shape, planned.notes
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtllm_redrafter.base_models.hf_config import read_base_config
from trtllm_redrafter.checkpoint.config import CheckpointConfig, read_checkpoint_config
from trtllm_redrafter.conversion.drafter_config import DrafterSettings, draft_shape, read_drafter_config, size_problems
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.errors import InputError, MismatchError, raise_together
from trtllm_redrafter.redrafter.config import DrafterConfig

ASSUMED_LAYERS = 2
"""Residual blocks of Apple's published drafters; their exit_dim is twice the hidden size."""


@dataclass(frozen=True)
class PlannedModel:
    """`notes` list the config's source and all assumptions."""

    config: CheckpointConfig
    notes: tuple[str, ...]


def checkpoint_model(checkpoint: Path) -> PlannedModel:
    """The model of a checkpoint that exists."""
    return PlannedModel(read_checkpoint_config(checkpoint), (f"model: checkpoint {checkpoint}",))


def planned_model(options: ConvertOptions) -> PlannedModel:
    """The model that a conversion would write; raises what it would refuse about the drafter."""
    config, notes = _base_config(options.base)
    config = options.applied_to(config)
    if options.drafter is None:
        return PlannedModel(config, (*notes, "no drafter: autoregressive"))
    drafter, note = _drafter_settings(options.drafter, config)
    shape, shape_notes, problems = draft_shape(drafter, num_beams=options.num_beams, draft_len=options.draft_len)
    problems += size_problems(drafter, config)
    raise_together(MismatchError, problems, "the drafter does not fit", where=options.drafter)
    config = config.with_drafter(drafter.config, shape, greedy=options.greedy)
    return PlannedModel(config, (*notes, note, *shape_notes))


def _base_config(base: Path) -> tuple[CheckpointConfig, tuple[str, ...]]:
    path, note = base / "config.json", f"model: {base}"
    if not path.is_file():
        found = _description(base.name)
        if found is None:
            raise InputError(
                "the base model does not exist, and configs/models/ has no description of it",
                where=base,
                remedy=f"download at least its config.json, or write configs/models/{base.name.lower()}.json",
            )
        path, note = found, f"model: {base} is not there yet, sizes are those of configs/models/{found.name}"
    config, notes = read_base_config(path)
    return config, (note, *notes)


def _description(name: str) -> Path | None:
    package = Path(__file__).resolve().parent.parent
    places = [package.parent / "configs" / "models", package / "configs" / "models", Path("configs/models")]
    found = [place / f"{name.lower()}.json" for place in places if (place / f"{name.lower()}.json").is_file()]
    return found[0] if found else None


def _drafter_settings(path: Path, base: CheckpointConfig) -> tuple[DrafterSettings, str]:
    """The drafter's settings, read or assumed, and which of the two."""
    if (path / "config.json").is_file():
        return read_drafter_config(path), f"drafter: {path}"
    sizes = DrafterConfig(base.vocab_size, base.hidden_size, 2 * base.hidden_size, ASSUMED_LAYERS)
    assumed = f"{ASSUMED_LAYERS} layers, exit_dim {sizes.exit_dim}, RNN"
    return DrafterSettings(path, sizes), f"drafter: {path} is not there yet, assumed {assumed}"
