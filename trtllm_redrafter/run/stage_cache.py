"""Is what a stage would write there already? Content decides, not dates.

A stage's fingerprint is the SHA-256 of its input files and of the options that shape its output. The work
directory records what each stage was last run with:

    runs/demo/.stages/convert.json     fingerprint, options, inputs, output, hash of the output's manifest
    runs/demo/.stages/hashes.json      SHA-256 by path, size, times and inode, so that inputs are read once

A hit means: same fingerprint, same output directory, and that directory still complete. A miss says what changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.manifest import Manifest, now
from trtllm_redrafter.checkpoint.names import MANIFEST
from trtllm_redrafter.conversion.drafter_config import DRAFT_LEN_IN_NAME
from trtllm_redrafter.errors import InputError, RedrafterError
from trtllm_redrafter.fsio import as_output_error, read_json, replace_json, sha256_file
from trtllm_redrafter.settings.layers import Resolved, plain
from trtllm_redrafter.settings.schema import SECTIONS
from trtllm_redrafter.version import __version__

CONVERT, BUILD, RUN = "convert", "build", "run"

_SETTLED_SECONDS = 2.0
"""A file younger than this may still change within the same time stamp; its hash is not kept."""


@dataclass(frozen=True)
class Fingerprint:
    """What a stage's output follows from."""

    options: Mapping[str, Any]
    inputs: Mapping[str, str]  # name → SHA-256

    @property
    def key(self) -> str:
        text = json.dumps({"options": dict(self.options), "inputs": dict(self.inputs)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def changes_since(self, options: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
        """What differs from an earlier run, one line each."""
        lines = [
            f"{name} was {json.dumps(options.get(name))}, is {json.dumps(self.options.get(name))}"
            for name in sorted({*options, *self.options})
            if options.get(name) != self.options.get(name)
        ]
        for name in sorted({*inputs, *self.inputs}):
            if name not in inputs:
                lines.append(f"{name} is new")
            elif name not in self.inputs:
                lines.append(f"{name} is gone")
            elif inputs[name] != self.inputs[name]:
                lines.append(f"{name} has other content")
        return lines


@dataclass(frozen=True)
class CacheVerdict:
    """Cache hit or miss, the reasons, and whether the existing output is this pipeline's own and may be replaced.

    `interrupted`: the existing output is unfinished, of the same inputs and options.
    """

    hit: bool
    reasons: tuple[str, ...]
    ours: bool
    interrupted: bool = False


class HashCache:
    """SHA-256 of files that are read once per content."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = _read_or_empty(path)

    def sha256(self, file: Path) -> str:
        try:
            stat = file.stat()
        except OSError as e:
            raise InputError("cannot read the file", where=file, why=str(e), remedy="check that it exists") from e
        name, stamp = str(file.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._entries.get(name)
        if isinstance(known, list) and known[:-1] == stamp and isinstance(known[-1], str):
            return known[-1]
        digest = sha256_file(file)
        if time.time() - stat.st_mtime > _SETTLED_SECONDS:
            self._entries[name] = [*stamp, digest]
        return digest

    def directory(self, path: Path, name: str, *, unread: Collection[str] = ()) -> dict[str, str]:
        """Hashes of every file below `path`, under `name/`, but for those with one of the suffixes in `unread`.

        What a stage reads depends on what is there (weights as safetensors or a pickle, shards in folders), so nothing
        is left out that it might. No stage reads hidden files and folders (`.git`, `.cache`).
        """
        if not path.is_dir():
            raise InputError(f"the {name} directory does not exist", where=path, remedy="check the path")
        found = {}
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for file in sorted(Path(folder) / f for f in files if not f.startswith(".")):
                if file.suffix.lower() not in unread and file.is_file():
                    found[f"{name}/{file.relative_to(path).as_posix()}"] = self.sha256(file)
        return found

    def save(self) -> None:
        with as_output_error(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(self._path, self._entries)


def manifest_hashes(directory: Path, name: str) -> dict[str, str]:
    """Hashes of an artefact of ours as its manifest gives them; sizes were checked when it was found whole."""
    return {f"{name}/{file}": record.sha256 for file, record in Manifest.read(directory).files.items()}


_NOT_SHAPING = {
    CONVERT: ("workers",),
    BUILD: ("tokenizer",),
    RUN: ("input", "output", "device"),
    "tensorrt_llm": ("workers", "cache", "cache_dir", "allow_sampling"),
    "tensorrt": ("executor",),
}
"""The keys of a section that do not decide what its stage writes. Paths do not either: the content behind them counts.

Only the exceptions are named, so that a key that is added to the schema is in the fingerprint from the start.
"""

_NEVER_READ = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".md", ".png")
"""Files of a base model's directory that no stage opens, whatever else is there; some are as large as the model."""


def _shaping(section: str) -> list[str]:
    return [key for key in SECTIONS[section].model_fields if key not in _NOT_SHAPING[section]]


def output_of(stage: str, resolved: Resolved) -> Path | None:
    recipe = resolved.recipe
    outputs: dict[str, Path | None] = {CONVERT: recipe.checkpoint, BUILD: recipe.engine, RUN: recipe.run.output}
    return outputs[stage]


def fingerprint(stage: str, resolved: Resolved, hashes: HashCache) -> Fingerprint:
    """Reads (or remembers) the content of everything the stage will read; its inputs must exist."""
    recipe = resolved.recipe
    options = {f"{stage}.{key}": plain(resolved.value(f"{stage}.{key}")) for key in _shaping(stage)}
    inputs: dict[str, str] = {}
    if stage == CONVERT:
        assert recipe.base is not None
        inputs |= hashes.directory(recipe.base, "base", unread=_NEVER_READ)
        if recipe.drafter is not None:
            names = (recipe.drafter.name, recipe.drafter.resolve().name)  # draft_len may come from there
            options["drafter_names"] = [m[0] for m in map(DRAFT_LEN_IN_NAME.search, names) if m is not None]
            inputs |= hashes.directory(recipe.drafter, "drafter")
    elif stage == BUILD:
        assert recipe.checkpoint is not None
        options["backend"] = recipe.backend
        if recipe.backend == "tensorrt-llm":
            keys = _shaping("tensorrt_llm")
            options |= {f"tensorrt_llm.{key}": plain(resolved.value(f"tensorrt_llm.{key}")) for key in keys}
        if recipe.backend == "tensorrt":
            keys = ["tensorrt_llm.gpu", *(f"tensorrt.{key}" for key in _shaping("tensorrt"))]
            options |= {key: plain(resolved.value(key)) for key in keys}
        inputs |= manifest_hashes(recipe.checkpoint, "checkpoint")
        if recipe.build.tokenizer is not None:
            inputs |= hashes.directory(recipe.build.tokenizer, "tokenizer")
    else:
        assert recipe.engine is not None
        options["chat_template_kwargs"] = dict(recipe.chat_template_kwargs)
        inputs |= {k: v for k, v in manifest_hashes(recipe.engine, "engine").items() if not k.endswith(MANIFEST)}
        if recipe.run.input is not None:
            inputs["input"] = hashes.sha256(recipe.run.input)
    return Fingerprint({"version": __version__, **options}, inputs)


class StageRecords:
    """What each stage was last run with.

    A record is written before its output gets its name: whenever a run is killed, an output in its place has one.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def check(self, stage: str, fingerprint: Fingerprint, output: Path) -> CacheVerdict:
        record = _checked(_read_or_empty(self._directory / f"{stage}.json"))
        exists = output.exists()
        ours = exists and record.get("output") == str(output.resolve())
        if not record:
            return CacheVerdict(
                False, ("it has not run before" if not exists else "its output is there, its record is not",), ours
            )
        changes = fingerprint.changes_since(record.get("options") or {}, record.get("inputs") or {})
        if not exists:
            return CacheVerdict(False, (f"{output} does not exist", *changes), False)
        if not ours:
            return CacheVerdict(False, (f"the output was {record.get('output')}", *changes), False)
        if changes or record.get("key") != fingerprint.key:
            return CacheVerdict(False, tuple(changes), ours)
        if record.get("finished") is None:
            return CacheVerdict(False, ("it was interrupted",), ours, interrupted=True)
        damage = _damage(output, record)
        if damage:
            return CacheVerdict(False, damage, ours)
        return CacheVerdict(True, (f"inputs and options are those of {record.get('finished')}",), ours)

    def begin(self, stage: str, fingerprint: Fingerprint, output: Path) -> None:
        """Remember what is about to write `output` bit by bit."""
        self._write(stage, fingerprint, output, {"finished": None})

    def store(self, stage: str, fingerprint: Fingerprint, output: Path, complete: Path | None = None) -> None:
        """Remember a complete output; `complete` is where it is while it does not have its name yet."""
        stamp = sha256_file(_stamp(output if complete is None else complete))
        self._write(stage, fingerprint, output, {"output_sha256": stamp, "finished": now()})

    def _write(self, stage: str, fingerprint: Fingerprint, output: Path, state: Mapping[str, Any]) -> None:
        values = {
            "key": fingerprint.key,
            "options": dict(fingerprint.options),
            "inputs": dict(fingerprint.inputs),
            "output": str(output.resolve()),
            **state,
        }
        with as_output_error(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_json(self._directory / f"{stage}.json", values)


def _stamp(output: Path) -> Path:
    """The file that stands for an output: a directory's manifest, or the file itself."""
    return output / MANIFEST if output.is_dir() else output


def _damage(output: Path, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Why an output is not what the stage wrote; hashes of large files are left to `verify`."""
    try:
        if sha256_file(_stamp(output)) != record.get("output_sha256"):
            return (f"{_stamp(output)} has been changed since",)
        problems = Manifest.read(output).check_files(output, hashes=False) if output.is_dir() else []
    except RedrafterError as error:
        return (error.render(),)
    return tuple(f"{p.where}: {p.what}" for p in problems)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """The record if its sections are what `store` writes, else an empty one."""
    sections = (record.get("options"), record.get("inputs"))
    return record if all(isinstance(section, dict) for section in sections) else {}


def _read_or_empty(path: Path) -> dict[str, Any]:
    """A cache that cannot be read is an empty one: its price is that a stage runs again."""
    try:
        return read_json(path)
    except InputError:
        return {}
