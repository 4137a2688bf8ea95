"""Engines and timing caches by content: the same checkpoint, flags, versions and GPU are not compiled twice.

cache_dir/
  engines/KEY/              a finished engine directory without tokenizer, as trtllm-build wrote it
  timing/GPU-VERSION.cache  TensorRT's measurements of kernels, so that the next build repeats none of them
  times.json                seconds of earlier builds, for the progress bar's estimate
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.base_models.tokenizer import GENERATION_CONFIG
from trtllm_redrafter.checkpoint.manifest import FileRecord
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import atomic_directory, link_or_copy, read_json, replace_json, sha256_file, write_json
from trtllm_redrafter.scratch import remove_tree, replaced_file

_RECORD = "cached.json"
_NOT_CACHED = ("redrafter.json", "manifest.json", "build.log", GENERATION_CONFIG)
"""What is added to a finished engine, and may differ between two engines of the same build."""


@dataclass(frozen=True)
class BuildIdentity:
    """Everything that determines a compiled engine."""

    checkpoint: Mapping[str, str]
    """File name → SHA-256."""
    arguments: tuple[str, ...]
    """Flags without paths."""
    versions: Mapping[str, str]
    gpu: str

    @property
    def key(self) -> str:
        text = json.dumps(
            {"checkpoint": dict(self.checkpoint), "arguments": list(self.arguments), "versions": dict(self.versions),
             "gpu": self.gpu},
            sort_keys=True,
        )  # fmt: skip
        return hashlib.sha256(text.encode()).hexdigest()


class EngineCache:
    """The cache below one directory."""

    def __init__(self, directory: Path) -> None:
        self._engines = directory / "engines"
        self._timing = directory / "timing"
        self._times = directory / "times.json"

    def fetch(self, identity: BuildIdentity, target: Path) -> bool:
        """Link a cached engine's files into `target`; False when there is none or it is damaged."""
        entry = self._engines / identity.key
        try:
            files = read_json(entry / _RECORD)["files"]
            intact = all((entry / name).stat().st_size == record["size"] for name, record in files.items())
            intact = intact and all(sha256_file(entry / name) == record["sha256"] for name, record in files.items())
        except (InputError, OSError, KeyError, TypeError):
            return False
        if not intact:
            remove_tree(entry)
            return False
        for name in files:
            link_or_copy(entry / name, target / name)
        return True

    def store(self, identity: BuildIdentity, engine: Path) -> None:
        """Keep what trtllm-build wrote; hard links, so it takes no extra space on the same disk."""
        entry = self._engines / identity.key
        if entry.exists():
            return
        files = [p for p in sorted(engine.iterdir()) if p.is_file() and p.name not in _NOT_CACHED]
        with atomic_directory(entry, overwrite=False) as work:
            for file in files:
                link_or_copy(file, work / file.name)
            records = {file.name: FileRecord.of(file).as_dict() for file in files}
            write_json(work / _RECORD, {"gpu": identity.gpu, "versions": dict(identity.versions), "files": records})

    def timing_cache(self, identity: BuildIdentity) -> Path:
        """Where measurements for this GPU and TensorRT are kept, whether it exists or not."""
        name = f"{identity.gpu}-{identity.versions.get('tensorrt', 'unknown')}.cache"
        return self._timing / "".join(c if c.isalnum() or c in "-._" else "_" for c in name)

    def keep_timing_cache(self, identity: BuildIdentity, written: Path) -> None:
        target = self.timing_cache(identity)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(target) as temporary:
            shutil.copyfile(written, temporary)

    def last_seconds(self, model: str) -> float | None:
        value = self._read_times().get(model)
        return float(value) if isinstance(value, (int, float)) else None

    def remember_seconds(self, model: str, seconds: float) -> None:
        times = self._read_times() | {model: round(seconds, 1)}
        self._times.parent.mkdir(parents=True, exist_ok=True)
        replace_json(self._times, times)

    def _read_times(self) -> dict[str, Any]:
        try:
            return read_json(self._times)
        except InputError:
            return {}
