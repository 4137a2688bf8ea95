"""`manifest.json`: what made this directory, from what, with which options, and what its files must hash to.

Checkpoints and engines carry one. It answers months later which drafter went into an engine, and lets `verify`
find a flipped bit or a half-finished upload:

    manifest = Manifest.read(path)
    manifest.inputs["base"]["path"], manifest.derived["max_tree_tokens"]
    problems = manifest.check_files(path, hashes=True)      # [] when all is well
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trtllm_redrafter import __version__
from trtllm_redrafter.errors import InputError, Problem
from trtllm_redrafter.fsio import CREATOR, read_json, safe_join, sha256_file, write_json

MANIFEST = "manifest.json"
OWN_HASH = "manifest_sha256"
DRAFTER_WEIGHTS = "model.safetensors"
"""The file of a drafter directory whose content is its identity."""

_SHOWN = 12
KINDS = ("checkpoint", "engine", "drafter")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and hex SHA-256 of one file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        return cls(path.stat().st_size, sha256_file(path))

    def as_dict(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self.sha256}


def creator() -> dict[str, str]:
    """This program and what it runs on; `name` marks the directory as ours."""
    import torch

    return {
        "name": CREATOR,
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. `files` maps names relative to the directory, `/`-separated."""

    kind: str
    inputs: Mapping[str, Any]
    options: Mapping[str, Any]
    derived: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    notes: tuple[str, ...] = ()
    creator: Mapping[str, Any] = field(default_factory=creator)
    created: str = field(default_factory=now)
    intact: bool = True
    """Is what was read what was written? The file carries the SHA-256 of its own content."""

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read a directory's manifest; `InputError` when it is missing or not one of ours."""
        path = directory / MANIFEST
        raw = read_json(path)
        files = raw.get("files")
        if raw.get("kind") not in KINDS or not isinstance(files, dict) or not all(map(_is_record, files.values())):
            raise InputError("this is not a manifest of ours", where=path, remedy="write the directory again")
        return cls(
            kind=raw["kind"],
            inputs=_section(raw, "inputs"),
            options=_section(raw, "options"),
            derived=_section(raw, "derived"),
            files={name: FileRecord(f["size"], f["sha256"]) for name, f in files.items()},
            notes=tuple(str(n) for n in raw.get("notes") or ()),
            creator=_section(raw, "creator"),
            created=str(raw.get("created", "")),
            intact=raw.get(OWN_HASH) in (None, _own_hash(raw)),
        )

    @classmethod
    def find(cls, directory: Path) -> Manifest | None:
        """The manifest, or None for a directory that never had one (another program's checkpoint)."""
        return cls.read(directory) if (directory / MANIFEST).exists() else None

    def write(self, directory: Path) -> None:
        values = self.as_dict()
        write_json(directory / MANIFEST, values | {OWN_HASH: _own_hash(values)})

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "creator": dict(self.creator),
            "created": self.created,
            "inputs": dict(self.inputs),
            "options": dict(self.options),
            "derived": dict(self.derived),
            "notes": list(self.notes),
            "files": {name: record.as_dict() for name, record in self.files.items()},
        }

    def check_files(self, directory: Path, *, hashes: bool, below: str = "") -> list[Problem]:
        """Every listed file that is missing, has another size or (with `hashes`) another content.

        `below` limits it to names that begin so, as `tokenizer/`.
        """
        names = [name for name in self.files if name.startswith(below)]
        found = [self._check(directory, name, self.files[name], hashes) for name in names]
        if hashes and not below and not self.intact:
            remedy = f"write the {self.kind} again, or copy the manifest from an intact one"
            found.append(Problem("the manifest has been changed since it was written", str(directory / MANIFEST),
                                 f"its content is not that of its own {OWN_HASH}", remedy))  # fmt: skip
        return [problem for problem in found if problem is not None]

    def unknown_files(self, directory: Path) -> list[Problem]:
        """Every file in `directory` that the manifest does not list, the first `_SHOWN` by name."""
        found = sorted(
            p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()
        )
        why = f"it was not there when the {self.kind} was written; nobody knows what reads it"
        remedy = "remove it, unless you put it there; then keep it elsewhere"
        what = "the manifest does not list this file"
        unknown = [name for name in found if name != MANIFEST and name not in self.files]
        more = [Problem(f"and {len(unknown) - _SHOWN} more files")] if len(unknown) > _SHOWN else []
        return [Problem(what, str(directory / name), why, remedy) for name in unknown[:_SHOWN]] + more

    def _check(self, directory: Path, name: str, record: FileRecord, hashes: bool) -> Problem | None:
        remedy = f"write the {self.kind} again, or copy the file from an intact one"
        path = safe_join(directory, name)
        if not path.is_file():
            return Problem("a file of the manifest is missing", str(path), None, remedy)
        size = path.stat().st_size
        if size != record.size:
            return Problem("the file's size has changed", str(path), f"{size} bytes, not {record.size}", remedy)
        if hashes and (digest := sha256_file(path)) != record.sha256:
            why = f"SHA-256 is {digest[:16]}…, the manifest says {record.sha256[:16]}…"
            return Problem("the file's content has changed", str(path), why, remedy)
        return None


def _own_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of everything in the file but itself, whatever its layout."""
    content = {key: value for key, value in values.items() if key != OWN_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("size")) is int and isinstance(value.get("sha256"), str)


def record_tree(directory: Path) -> dict[str, FileRecord]:
    """Hash every file below a directory, except its manifest."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    return {p.relative_to(directory).as_posix(): FileRecord.of(p) for p in paths}
