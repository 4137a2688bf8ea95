"""An engine's config.json, for both backends: read once, checked, and passed on to whatever loads the engine.

An engine directory may come from another version or another program, or have been edited: a batch size of 0 or a
missing key must end in a message here, not in an endless loop or a KeyError in the middle of loading.

What an engine drafts is stored where TensorRT-LLM stores it, in its model's config: a section of a TensorRT engine's
config.json, the config.json of the checkpoint inside a torch engine; `checkpoint.config.read_draft_shape` parses it.

    config = read_engine_config(Path("engine"))
    config.backend, config.draft_shape          # "torch", DraftShape(4, 4); None without a drafter
    load_backend(config.backend).load(config, device="cpu", verify_hashes=False)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from trtllm_redrafter.checkpoint.config import MAX_RANKS, read_draft_shape
from trtllm_redrafter.checkpoint.fields import FieldReader, Schema, Size, validated
from trtllm_redrafter.checkpoint.kinds import Kind, kind_of, wrong_kind
from trtllm_redrafter.checkpoint.names import ENGINE_CHECKPOINT
from trtllm_redrafter.errors import BackendError, InputError, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.version import __version__

TORCH, TENSORRT = "torch", "tensorrt-llm"
TENSORRT_STEPS = "tensorrt"
"""TensorRT itself, without TensorRT-LLM."""

STEP_ENGINE_FORMAT = 2
"""`format` of engines of that backend; those of the torch backend have the same fields here."""

TORCH_ENGINE_FORMAT = 2
"""`format` of engines of the torch backend. Format 1, which is still read, repeated the draft shape."""

_WHAT = "the engine's config.json is not usable"
_REMEDY = "build the engine again"


class EngineLimits(Schema):
    """What an engine was built for. TensorRT-LLM's `max_seq_len` includes the drafted tokens."""

    max_batch_size: Size
    max_input_len: Size
    max_seq_len: Size


class RankMapping(Schema):
    world_size: Annotated[int, Field(ge=1, le=MAX_RANKS)] = 1


class ModelConfig(Schema):
    """What running an engine needs of its model's config, in TensorRT-LLM's names."""

    vocab_size: Size
    dtype: str = ""
    mapping: RankMapping = RankMapping()
    redrafter_greedy_search: bool = True


HeadRows = Annotated[int, Field(ge=0)]


class _Format1(Schema):
    head_rows: HeadRows


class _TorchFile(Schema):
    """config.json of an engine of the torch backend."""

    backend: Literal["torch", "tensorrt"]
    version: str = ""
    build_config: EngineLimits
    draft_head_rows: HeadRows = 0
    draft: _Format1 | None = None
    eos_token_ids: list[Annotated[int, Field(ge=0)]] | None = None


class _TensorRTFile(Schema):
    """config.json of a TensorRT-LLM engine."""

    version: str = ""
    pretrained_config: ModelConfig
    build_config: EngineLimits


@dataclass(frozen=True)
class EngineConfig:
    """A checked config.json. `version` is that of what built the engine: TensorRT-LLM, or this program."""

    path: Path
    backend: str
    version: str
    limits: EngineLimits
    model: ModelConfig
    model_values: Mapping[str, Any]
    """The whole of the model's config, as it is in the file `model_file`."""
    model_file: Path
    draft_shape: DraftShape | None
    """None without a drafter."""
    head_rows: int = 0
    """Of the most frequent tokens, how many drafts are taken from; 0: all tokens."""
    eos_token_ids: tuple[int, ...] | None = None
    """None: they are recorded elsewhere."""

    @property
    def max_seq_len(self) -> int:
        """Tokens of prompt and answer together."""
        shape = self.draft_shape if self.backend == TENSORRT else None
        return self.limits.max_seq_len - (0 if shape is None else shape.max_draft_tokens)


def read_engine_config(engine: Path | EngineConfig, *, backend: str | None = None) -> EngineConfig:
    """The checked config of an engine directory, or the one that has been read already.

    `InputError` lists every key that is wrong. `BackendError`: an engine of another version's format, or built for
    another backend than `backend`.
    """
    if isinstance(engine, EngineConfig):
        _check_backend(engine.backend, backend, engine.path)
        return engine
    values = _read(engine)
    found = _backend_of(values, engine)
    _check_backend(found, backend, engine)
    model = read_json(engine / ENGINE_CHECKPOINT / "config.json") if found != TENSORRT else {}
    return parse_engine_config(values, model, engine)


def parse_engine_config(values: Mapping[str, Any], model: Mapping[str, Any], engine: Path) -> EngineConfig:
    """The same for JSON that has been read. `model` is the config of a torch engine's checkpoint."""
    where = engine / "config.json"
    if _backend_of(values, engine) == TENSORRT:
        found = _tensorrt(values, engine, where)
    else:
        found = _torch(values, model, engine, where)
    shape = found.draft_shape
    if found.max_seq_len < 1 and shape is not None:
        why = f"{shape.max_draft_tokens} drafted tokens are part of it"
        what = f"build_config.max_seq_len is {found.limits.max_seq_len}"
        raise InputError(what, where=where, why=why, remedy=_REMEDY)
    return found


def _tensorrt(values: Mapping[str, Any], engine: Path, where: Path) -> EngineConfig:
    file = validated(_TensorRTFile, values, where=where, what=_WHAT, remedy=_REMEDY)
    model = file.pretrained_config
    return EngineConfig(
        engine, TENSORRT, file.version, file.build_config, model, values["pretrained_config"], where,
        _draft_shape(values["pretrained_config"], where),
    )  # fmt: skip


def _torch(values: Mapping[str, Any], model: Mapping[str, Any], engine: Path, where: Path) -> EngineConfig:
    if values.get("format") not in (1, TORCH_ENGINE_FORMAT):
        raise BackendError(
            f"the engine has format {values.get('format')!r}, this version reads {TORCH_ENGINE_FORMAT}",
            where=engine,
            why=f"it was built by version {values.get('version')!r}, this is {__version__}",
            remedy="build it again",
        )
    file = validated(_TorchFile, values, where=where, what=_WHAT, remedy=_REMEDY)
    inside = engine / ENGINE_CHECKPOINT / "config.json"
    known = validated(ModelConfig, model, where=inside, what=_WHAT, remedy=_REMEDY)
    return EngineConfig(
        engine, file.backend, file.version, file.build_config, known, model, inside, _draft_shape(model, inside),
        head_rows=file.draft_head_rows if file.draft is None else file.draft.head_rows,
        eos_token_ids=None if file.eos_token_ids is None else tuple(file.eos_token_ids),
    )  # fmt: skip


def _draft_shape(model: Mapping[str, Any], where: Path) -> DraftShape | None:
    if model.get("redrafter_num_beams") is None:
        return None
    fields = FieldReader(model, where)
    shape = read_draft_shape(fields)
    raise_together(InputError, fields.problems, _WHAT, where=where, remedy=_REMEDY)
    return shape


def _check_backend(found: str, wanted: str | None, engine: Path) -> None:
    if wanted not in (None, found):
        raise BackendError(
            f"the engine was built for the {found} backend",
            where=engine,
            remedy=f"load it with that backend, or build the checkpoint again with --backend {wanted}",
        )


def engine_backend(engine: Path) -> str:
    """Name of the backend that an engine directory was built for; `InputError` when it is no engine."""
    return _backend_of(_read(engine), engine)


def _read(engine: Path) -> dict[str, Any]:
    if not engine.is_dir():
        raise InputError("the engine directory does not exist", where=engine, remedy="check the path, or run `build`")
    return read_json(engine / "config.json")


def _backend_of(config: Mapping[str, Any], engine: Path) -> str:
    if "backend" in config:
        return str(config["backend"])
    if kind_of(config) is Kind.TENSORRT_ENGINE:
        return TENSORRT
    raise wrong_kind(engine, config, Kind.TORCH_ENGINE)
