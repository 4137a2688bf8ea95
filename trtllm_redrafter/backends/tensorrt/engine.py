"""An engine directory of this backend, read and checked against the checkpoint that it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import onnx
from pydantic import Field

from trtllm_redrafter.backends.engine_config import EngineConfig
from trtllm_redrafter.backends.tensorrt.compilers import COMPILERS
from trtllm_redrafter.backends.tensorrt.network import Sizes
from trtllm_redrafter.backends.tensorrt.networks import Network, engine_sizes, make_network, network_sha256
from trtllm_redrafter.checkpoint.fields import Schema, validated
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.structure import require_sound
from trtllm_redrafter.errors import BackendError, InputError, Problem, UsageError, raise_together
from trtllm_redrafter.fsio import read_json, sample_sha256, sha256_file
from trtllm_redrafter.redrafter.config import DraftShape


class _File(Schema):
    size: Annotated[int, Field(ge=0)]
    sha256: str
    sample_sha256: str


class _Source(Schema):
    path: str
    relative: str
    files: dict[str, _File]


class _Compiler(Schema):
    name: str
    version: str


class _Compiled(Schema):
    file: str
    onnx_sha256: str


class EngineFile(Schema):
    """What config.json of such an engine has beyond that of other engines."""

    gpu: str
    weights: Literal["inputs", "inside"]
    compute_capability: list[Annotated[int, Field(ge=0)]]
    compiler: _Compiler
    checkpoint: _Source
    networks: dict[str, _Compiled]


@dataclass(frozen=True)
class CompiledEngine:
    """An engine directory, read and checked."""

    config: EngineConfig
    file: EngineFile
    checkpoint: Checkpoint
    sizes: Sizes


def open_engine(
    config: EngineConfig, asked: DraftShape | None, verify_hashes: bool, *, shape_is_free: bool
) -> CompiledEngine:
    path = config.path
    what, remedy = "the engine's config.json is not usable", "build the engine again"
    where = path / "config.json"
    file = validated(EngineFile, read_json(where), where=where, what=what, remedy=remedy)
    if file.compiler.name not in COMPILERS:
        raise InputError(f"the engine's compiler is {file.compiler.name!r}", where=where, remedy=remedy)
    manifest = Manifest.read(path)
    problems = manifest.check_files(path, hashes=verify_hashes) or manifest.check_tokenizer(path)
    raise_together(InputError, problems, "the engine's files have changed since it was built", where=path)
    checkpoint = Checkpoint.open(_checkpoint_of(path, file, verify_hashes))
    require_sound(checkpoint)
    own = checkpoint.config.draft_shape
    if asked is not None and asked != own and not shape_is_free:
        raise UsageError(
            "the engine drafts what it was compiled for",
            where=path,
            why="beams and draft length are part of a compiled network",
            remedy="leave --num-beams and --draft-len out, or convert with others and build again",
        )
    sizes = engine_sizes(checkpoint, asked or own, max_seq_len=config.limits.max_seq_len, head_rows=config.head_rows)
    return CompiledEngine(config, file, checkpoint, sizes)


def _checkpoint_of(engine: Path, file: EngineFile, verify_hashes: bool) -> Path:
    """The checkpoint that the engine was built from, unchanged; `InputError` otherwise."""
    places = [engine.resolve() / file.checkpoint.relative, Path(file.checkpoint.path)]
    place = next((p.resolve() for p in places if p.is_dir()), None)
    if place is None:
        raise InputError(
            "the engine's checkpoint is not there",
            where=file.checkpoint.path,
            why="an engine of this backend has no weights: it runs on those of the checkpoint it was built from",
            remedy="put the checkpoint back, or build the engine again where it is now",
        )
    problems = []
    for name, record in file.checkpoint.files.items():
        path = place / name
        if not path.is_file():
            problems.append(Problem("a file of the checkpoint is missing", str(path)))
        elif (
            path.stat().st_size != record.size
            or sample_sha256(path) != record.sample_sha256
            or (verify_hashes and sha256_file(path) != record.sha256)
        ):
            problems.append(Problem("the file has changed since the engine was built", str(path)))
    remedy = "put the checkpoint back, or build the engine again"
    raise_together(InputError, problems, "the engine's checkpoint has changed", where=place, remedy=remedy)
    return place


def network_of(engine: CompiledEngine, network: Network) -> onnx.ModelProto:
    """The network that was compiled; `BackendError` when this version makes another one of the same checkpoint."""
    model = make_network(engine.sizes, network)
    compiled = engine.file.networks.get(network.name)
    own = engine.sizes.draft == engine.checkpoint.config.draft_shape
    if own and (compiled is None or compiled.onnx_sha256 != network_sha256(model)):
        raise BackendError(
            f"the engine's network {network.name} is another one than this version makes",
            where=engine.config.path,
            why=f"it was built by version {engine.config.version!r}",
            remedy="build it again",
        )
    return model
