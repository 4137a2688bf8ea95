"""Is a checkpoint or engine what its config and manifest say? Hashes, names, shapes and dtypes.

All problems are reported together:

    report = verify_files(Path("checkpoint"), hashes=True)
    report.ok, report.render()
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.kinds import COMPILED, ENGINES, Kind, kind_at, kind_of
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import ENGINE_CHECKPOINT, MANIFEST, rank_file
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.structure import finite_problems, structure_problems
from trtllm_redrafter.errors import InputError, Problem, RedrafterError, limited
from trtllm_redrafter.fsio import read_json

_SHOWN = 8

_READ_SUFFIXES = (".json", ".safetensors", ".engine", ".py", ".jinja", ".model", ".bin", ".pt", ".so")
"""Suffixes of files that a loader may read just because they are there."""

_WITHOUT_MANIFEST = (
    "no manifest.json, so these are not known: whether files are complete and unchanged since they were written, "
    "which base model and drafter went in, and whether whole ranks were exchanged (a tied LM head shows that); "
    "--against and --drafter compare the values"
)


@dataclass
class VerifyReport:
    """What was checked, and the problems found; each check adds to it."""

    path: Path
    checks: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def render(self) -> str:
        outcome = "all checks passed" if self.ok else f"{len(self.problems)} problem(s)"
        lines = [f"{self.path}: {outcome}", *(f"  checked: {check}" for check in self.checks)]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines + [problem.bullet() for problem in self.problems])

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "ok": self.ok,
            "checks": self.checks,
            "problems": [p.as_dict() for p in self.problems],
            "notes": self.notes,
        }


def checkpoint_directory(path: Path) -> Path:
    """The checkpoint itself: `path`, or the one inside an engine of the torch backend."""
    inside = path / ENGINE_CHECKPOINT
    return inside if (inside / "config.json").is_file() else path


def verify_files(path: Path, *, hashes: bool) -> VerifyReport:
    """Manifest, names, shapes and dtypes. Unreadable files are problems like any other.

    `InputError` when `path` is neither a checkpoint nor an engine.
    """
    _refuse_others(path)
    report = VerifyReport(path)
    checks, problems, notes = report.checks, report.problems, report.notes
    try:
        manifest = Manifest.find(path)
        if manifest is None and checkpoint_directory(path) != path:
            why = "an engine is not loaded without its manifest"
            problems.append(Problem("manifest.json is missing", str(path), why, "build the engine again"))
        elif manifest is None:
            notes.append(_WITHOUT_MANIFEST)
        else:
            problems += manifest.check_files(path, hashes=hashes)
            planted, harmless = _unlisted(manifest, path)
            problems += planted
            notes += harmless
            what = "size and SHA-256" if hashes else "size"
            checks.append(f"{what} of {len(manifest.files)} files against manifest.json, and that there are no others")
        if kind_at(path) in COMPILED:
            notes.append("a compiled engine: its plans are compared by hash only; --reference runs it")
            return report
        checkpoint = Checkpoint.open(checkpoint_directory(path))
        problems += structure_problems(checkpoint)
        count = sum(len(rank) for rank in checkpoint.ranks)
        checks.append(f"name, shape and dtype of {count} tensors in {len(checkpoint.ranks)} rank file(s)")
        if hashes:
            problems += limited(list(finite_problems(checkpoint)))
            checks[-1] += ", and that every value is finite"
        if any(not spec.checked for spec in checkpoint.specs.values()):
            notes.append(f"shapes of layers quantized as {checkpoint.config.quant_algo} are not known here")
    except RedrafterError as e:
        problems += e.problems or (e.problem,)
    return report


def _unlisted(manifest: Manifest, path: Path) -> tuple[list[Problem], list[str]]:
    """Files that the manifest does not list: a problem if something would read them, else a note."""
    names = manifest.unlisted(path)
    read = [n for n in names if "/" in n or Path(n).suffix in _READ_SUFFIXES or (path / n).is_symlink()]
    why = f"manifest.json does not list it, so it was not there when the {manifest.kind} was written"
    problems = [
        Problem("an unknown file that may be read, or run", str(path / name), why, "remove it, or write it all again")
        for name in read
    ]
    others = [name for name in names if name not in read]
    shown = ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")
    return limited(problems), [f"not listed in manifest.json, and not checked: {shown}"] if others else []


def _refuse_others(path: Path) -> None:
    """Raise unless `path` is meant to be a checkpoint or an engine, damaged or not."""
    if not path.is_dir():
        what = "this is a file, not a directory" if path.exists() else "the directory does not exist"
        raise InputError(what, where=path, remedy="name a checkpoint or an engine")
    try:
        config = read_json(path / "config.json")
    except InputError:
        if not (path / MANIFEST).exists() and not rank_file(path, 0).exists():
            raise
        return
    if kind_of(config) not in (Kind.CHECKPOINT, *ENGINES):
        remedy = "name a checkpoint or an engine; `inspect` says what other directories are"
        raise InputError("this is neither a checkpoint nor an engine", where=path, remedy=remedy)
