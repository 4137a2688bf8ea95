"""The schema of an engine's config.json, for both backends: what loading relies on, checked when it is read.

An engine directory may come from another version or another program, or have been edited: a batch size of 0 or a
missing key must end in a message here, not in an endless loop or a KeyError in the middle of loading.

    read_engine_config(Path("engine")).draft_shape      # DraftShape(4, 4), or None without a drafter
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from trtllm_redrafter.checkpoint.config import MAX_RANKS
from trtllm_redrafter.checkpoint.validation import Schema, Size, validated
from trtllm_redrafter.errors import BackendError, InputError, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.version import __version__

TORCH_ENGINE_FORMAT = 1
"""`format` of engines of the torch backend."""

_REMEDY = "build the engine again"


class Limits(Schema):
    """What an engine was built for. TensorRT-LLM's `max_seq_len` includes the drafted tokens."""

    max_batch_size: Size
    max_input_len: Size
    max_seq_len: Size


class DraftSettings(Schema):
    num_beams: Size
    draft_len: Size
    head_rows: Annotated[int, Field(ge=0)]


class TorchEngineConfig(Schema):
    """config.json of an engine of the torch backend."""

    backend: Literal["torch"]
    build_config: Limits
    draft: DraftSettings | None
    eos_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    """None: an engine of a version that did not record them."""

    @property
    def draft_shape(self) -> DraftShape | None:
        return None if self.draft is None else DraftShape(self.draft.num_beams, self.draft.draft_len)


class RankMapping(Schema):
    world_size: Annotated[int, Field(ge=1, le=MAX_RANKS)] = 1


class PretrainedConfig(Schema):
    vocab_size: Size
    dtype: str = ""
    mapping: RankMapping = RankMapping()
    redrafter_num_beams: Size | None = None
    redrafter_draft_len_per_beam: Size | None = None
    redrafter_greedy_search: bool = True


class TensorRTEngineConfig(Schema):
    """config.json of a TensorRT-LLM engine."""

    version: str = ""
    pretrained_config: PretrainedConfig
    build_config: Limits

    @property
    def draft_shape(self) -> DraftShape | None:
        beams, length = self.pretrained_config.redrafter_num_beams, self.pretrained_config.redrafter_draft_len_per_beam
        return None if beams is None or length is None else DraftShape(beams, length)


EngineConfig = TorchEngineConfig | TensorRTEngineConfig


def read_engine_config(engine: Path) -> EngineConfig:
    """The checked config.json of an engine directory.

    `InputError` lists every key that is wrong, `BackendError` an engine of another version's format.
    """
    path = engine / "config.json"
    return parse_engine_config(read_json(path), path)


def parse_engine_config(values: Mapping[str, Any], where: Path) -> EngineConfig:
    """The same for JSON that has been read."""
    what = "the engine's config.json is not usable"
    found: EngineConfig
    if "pretrained_config" in values:
        found = validated(TensorRTEngineConfig, values, where=where, what=what, remedy=_REMEDY)
    else:
        _check_format(values, where)
        found = validated(TorchEngineConfig, values, where=where, what=what, remedy=_REMEDY)
    shape = found.draft_shape
    if shape is not None:
        raise_together(InputError, shape.problems(), what, where=where, remedy=_REMEDY)
        drafted = shape.drafted_tokens if isinstance(found, TensorRTEngineConfig) else 0
        if found.build_config.max_seq_len <= drafted:
            why = f"{drafted} drafted tokens are part of it"
            what = f"build_config.max_seq_len is {found.build_config.max_seq_len}"
            raise InputError(what, where=where, why=why, remedy=_REMEDY)
    return found


def _check_format(values: Mapping[str, Any], where: Path) -> None:
    if values.get("format") != TORCH_ENGINE_FORMAT:
        raise BackendError(
            f"the engine has format {values.get('format')!r}, this version reads {TORCH_ENGINE_FORMAT}",
            where=where.parent,
            why=f"it was built by version {values.get('version')!r}, this is {__version__}",
            remedy="build it again",
        )


def engine_backend(engine: Path) -> str:
    """Name of the backend that an engine directory was built for; `InputError` when it is no engine."""
    if not engine.is_dir():
        raise InputError("the engine directory does not exist", where=engine, remedy="check the path, or run `build`")
    config = read_json(engine / "config.json")
    if "backend" in config:
        return str(config["backend"])
    if "pretrained_config" in config and "build_config" in config:
        return "tensorrt-llm"
    if "architecture" in config:
        raise InputError(
            "this is a checkpoint, not an engine",
            where=engine,
            why="it has not been built for a backend",
            remedy="run `trtllm-redrafter build --checkpoint` on it and pass that output to --engine",
        )
    raise InputError(
        "this is not an engine", where=engine, why="its config.json names no backend", remedy="check the path"
    )
