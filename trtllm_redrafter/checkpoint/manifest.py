"""`manifest.json`: what wrote this directory, from which inputs and options, and the hashes of its files.

Checkpoints, engines and drafters have one. It says, months later, which drafter an engine was built with, and lets
`verify` find a flipped bit or an incomplete upload:

    manifest = Manifest.read(path)
    manifest.inputs["base"]["path"], manifest.trained_draft_len
    problems = manifest.check_files(path, hashes=True)      # [] if there are none
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from trtllm_redrafter.checkpoint.fields import Schema, validated
from trtllm_redrafter.checkpoint.names import EOS_TOKEN_IDS, MANIFEST, TOKENIZER_DIRECTORY, TRAINED_DRAFT_LEN
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.fsio import CREATOR, read_json, safe_join, sample_sha256, sha256_file, write_json
from trtllm_redrafter.version import __version__

OWN_HASH = "manifest_sha256"
_RANK_FILE = re.compile(r"rank\d+\.(safetensors|engine)")
_TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and hex SHA-256 of one file.

    `sample_sha256` covers a few of its pages, so that each load can tell apart files of equal size without reading them
    whole. Rank files have it.
    """

    size: int
    sha256: str
    sample_sha256: str | None = None

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        return cls(path.stat().st_size, sha256_file(path))

    def with_sample(self, path: Path) -> FileRecord:
        """This record with the sample of its file at `path`."""
        return replace(self, sample_sha256=sample_sha256(path))

    def as_dict(self) -> dict[str, Any]:
        sample = {} if self.sample_sha256 is None else {"sample_sha256": self.sample_sha256}
        return {"size": self.size, "sha256": self.sha256, **sample}


class _Record(Schema):
    size: Annotated[int, Field(ge=0)]
    sha256: str
    sample_sha256: str | None = None


class _File(Schema):
    """manifest.json as it is read; sections of later versions are ignored."""

    kind: Literal["checkpoint", "engine", "drafter"]
    files: dict[str, _Record]
    inputs: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    derived: dict[str, Any] | None = None
    creator: dict[str, Any] | None = None
    notes: list[str] | None = None
    created: str | None = None


def creator() -> dict[str, str]:
    """This program and its platform; `name` identifies directories that it wrote."""
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
    """Is the manifest itself unchanged? The file has the SHA-256 of its own content."""

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read a directory's manifest; `InputError` if it is missing or was not written by this program."""
        path = directory / MANIFEST
        raw = read_json(path)
        remedy = "write the directory again"
        found = validated(_File, raw, where=path, what="this is not a manifest written by this program", remedy=remedy)
        return cls(
            kind=found.kind,
            inputs=found.inputs or {},
            options=found.options or {},
            derived=found.derived or {},
            files={name: FileRecord(f.size, f.sha256, f.sample_sha256) for name, f in found.files.items()},
            notes=tuple(found.notes or ()),
            creator=found.creator or {},
            created=found.created or "",
            intact=raw.get(OWN_HASH) in (None, _own_hash(raw)),
        )

    @classmethod
    def find(cls, directory: Path) -> Manifest | None:
        """The manifest, or None for a directory without one (another program's checkpoint)."""
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
        """A problem for each listed file that is missing, or whose size or (with `hashes`) content has changed.

        `below` limits the check to names with that prefix, such as `tokenizer/`.
        """
        names = [name for name in self.files if name.startswith(below)]
        found = [self._check(directory, name, self.files[name], hashes) for name in names]
        if not any(found) and not below:
            found += self._exchanged(directory)
        if hashes and not below and not self.intact:
            remedy = f"write the {self.kind} again, or copy the manifest from an intact one"
            found.append(Problem("the manifest has been changed since it was written", str(directory / MANIFEST),
                                 f"its content does not match its {OWN_HASH}", remedy))  # fmt: skip
        return [problem for problem in found if problem is not None]

    @property
    def end_tokens(self) -> object:
        """The recorded end tokens, unchecked; () if there are none."""
        return self.derived.get(EOS_TOKEN_IDS, ())

    @property
    def trained_draft_len(self) -> int | None:
        """How many tokens ahead a checkpoint's drafter was trained; None where nothing says so."""
        found = self.derived.get(TRAINED_DRAFT_LEN)
        return found if isinstance(found, int) else None

    @property
    def tokenizer_sha256(self) -> str | None:
        """Identity of the tokenizer of the base model that a checkpoint was made from."""
        base = self.inputs.get("base")
        return base.get("tokenizer_sha256") if isinstance(base, dict) else None

    def check_tokenizer(self, directory: Path) -> list[Problem]:
        """Problems with the tokenizer's files: changed ones, and ones that were added later.

        Every load asks this: the files are small, and transformers reads any file that has one of its names.
        """
        why = f"manifest.json does not list it, so it was not there when the {self.kind} was written"
        remedy = f"remove it, or write the {self.kind} again with the tokenizer that is meant"
        return [
            *self.check_files(directory, hashes=True, below=f"{TOKENIZER_DIRECTORY}/"),
            *(
                Problem("an unknown file of the tokenizer", str(directory / name), why, remedy)
                for name in self.unlisted(directory)
                if Path(name).parts[0] == TOKENIZER_DIRECTORY and Path(name).suffix in _TOKENIZER_SUFFIXES
            ),
        ]

    def unlisted(self, directory: Path) -> list[str]:
        """Names of files below `directory` that the manifest does not list, sorted; links are named, not followed."""
        found = []
        for folder, folders, names in os.walk(directory):
            links = [name for name in folders if (Path(folder) / name).is_symlink()]
            for name in [*links, *names]:
                relative = (Path(folder) / name).relative_to(directory).as_posix()
                if relative != MANIFEST and relative not in self.files:
                    found.append(relative)
        return sorted(found)

    def _exchanged(self, directory: Path) -> Iterator[Problem]:
        """Rank files of equal size that were swapped, recognised by a sample of their bytes."""
        names = {record.sample_sha256: name for name, record in self.files.items() if record.sample_sha256}
        for name, record in self.files.items():
            if record.sample_sha256 is None or len(names) == 1:
                continue
            path = safe_join(directory, name)
            other = names.get(sample_sha256(path), name)
            if other != name and self.files[other].sample_sha256 != record.sample_sha256:
                remedy = f"put the rank files back, or write the {self.kind} again"
                yield Problem(
                    f"the file holds what {other} should", str(path), "rank files have been exchanged", remedy
                )

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
    """SHA-256 of the file's content without this hash, independent of its formatting."""
    content = {key: value for key, value in values.items() if key != OWN_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def record_tree(directory: Path) -> dict[str, FileRecord]:
    """Hash every file below a directory, except its manifest."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    return {
        p.relative_to(directory).as_posix(): (
            FileRecord.of(p).with_sample(p) if _RANK_FILE.fullmatch(p.name) else FileRecord.of(p)
        )
        for p in paths
    }
