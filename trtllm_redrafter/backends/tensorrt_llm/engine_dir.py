"""An engine directory: what TensorRT-LLM wrote, what we added, and whether the two are whole and belong together.

engine/
  config.json       TensorRT-LLM's: version, pretrained_config, build_config
  rank{N}.engine    one compiled plan per GPU
  redrafter.json    ours: format, release, GPU, runtime options
  manifest.json     ours: what made it, hashes
  generation_config.json    the base's, where trtllm-serve looks for it
  tokenizer/        tokenizer, chat template, generation_config.json, the base's config.json
  build.log         what trtllm-build said
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.engine_config import TENSORRT, EngineConfig, read_engine_config
from trtllm_redrafter.backends.tensorrt_llm.options import RuntimeOptions
from trtllm_redrafter.checkpoint.fields import Schema, validated
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import MANIFEST
from trtllm_redrafter.errors import BackendError, InputError, Problem, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.redrafter.config import DraftShape

NOTES_FILE = "redrafter.json"
ENGINE_FORMAT = 1


@dataclass(frozen=True)
class EngineDirectory:
    """A checked engine directory; nothing of it is loaded."""

    config: EngineConfig
    notes: Mapping[str, Any]
    tensorrt: str | None
    """TensorRT's version that compiled it, as the manifest says."""

    @property
    def path(self) -> Path:
        return self.config.path

    @property
    def draft_shape(self) -> DraftShape | None:
        return self.config.draft_shape

    @property
    def world_size(self) -> int:
        return self.config.model.mapping.world_size

    @property
    def greedy(self) -> bool:
        """Without a drafter, the executor samples as it is asked to."""
        return self.config.model.redrafter_greedy_search and self.draft_shape is not None

    @property
    def runtime(self) -> RuntimeOptions:
        try:
            found = RuntimeOptions(**self.notes["runtime"])
            _check_runtime(found)
            return found
        except (KeyError, TypeError) as error:
            what = f"{NOTES_FILE} has runtime options that this version does not know"
            raise BackendError(what, where=self.path, why=str(error), remedy="build it again") from error


def _check_runtime(options: RuntimeOptions) -> None:
    """`TypeError` for values of another type; which interfaces there are is checked where one is chosen."""
    fraction = options.kv_cache_fraction
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0.0 < fraction < 1.0:
        raise TypeError(f"kv_cache_fraction is {fraction!r}")
    for name in ("block_reuse", "multi_block_mode"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(f"{name} is {getattr(options, name)!r}")


class _Gpu(Schema):
    name: str = ""
    compute_capability: tuple[int, ...] | list[int] = ()


class _Notes(Schema):
    """redrafter.json: what `build` added to the engine."""

    gpu: _Gpu = _Gpu()


def read_engine(engine: Path | EngineConfig, *, verify_hashes: bool) -> EngineDirectory:
    """Open and check; every problem at once."""
    config = read_engine_config(engine, backend=TENSORRT)
    path = config.path
    if not (path / NOTES_FILE).is_file() or not (path / MANIFEST).is_file():
        raise InputError(
            "the engine was not built by this program",
            where=path,
            why=f"it has no {NOTES_FILE}, so its release, GPU, tokenizer and runtime options are not known",
            remedy="build its checkpoint with `trtllm-redrafter build --backend tensorrt-llm`",
        )
    notes = read_json(path / NOTES_FILE)
    if notes.get("format") != ENGINE_FORMAT:
        what = f"the engine has format {notes.get('format')!r}, this version reads {ENGINE_FORMAT}"
        raise BackendError(what, where=path, remedy="build it again")
    validated(_Notes, notes, where=path / NOTES_FILE, what=f"{NOTES_FILE} is not usable", remedy="build it again")
    manifest = Manifest.read(path)
    versions = manifest.derived.get("versions")
    compiler = versions.get("tensorrt") if isinstance(versions, dict) else None
    found = EngineDirectory(config, notes, compiler)
    problems = [*rank_problems(path, found.world_size)]
    problems = problems or manifest.check_files(path, hashes=verify_hashes) or manifest.check_tokenizer(path)
    raise_together(InputError, problems, "the engine is not whole", where=path, remedy="build it again")
    return found


def rank_problems(path: Path, ranks: int) -> list[Problem]:
    """Rank files that are missing; TensorRT-LLM would say so only after MPI has started."""
    names = [f"rank{rank}.engine" for rank in range(ranks)]
    remedy = f"config.json names {ranks} rank(s); build the engine again"
    return [Problem(f"{name} is missing", str(path), None, remedy) for name in names if not (path / name).is_file()]


def expectation_problems(config: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> list[Problem]:
    """Where the finished engine is not what the plan said; `expected` has the form of its `build_config`."""
    why = "the builder changed it in a way this version does not know; the plan's memory figures do not hold"
    return [
        Problem(f"{key} is {found!r}, the plan said {value!r}", str(where), why, None)
        for key, found, value in _differences(config.get("build_config"), expected)
    ]


def _differences(found: object, expected: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Values that are there and differ; a release may leave out what it does not know."""
    for key, value in expected.items():
        if not isinstance(found, dict) or key not in found:
            continue
        if isinstance(value, Mapping):
            yield from _differences(found[key], value)
        elif found[key] != value:
            yield key, found[key], value
