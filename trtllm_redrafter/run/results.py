"""Results as a JSONL file that an interrupted run can continue.

Rows are appended as prompts finish, each in one write. A row says which prompt it answers:

    {"id": "line-7", "source": "prompts.jsonl, line 7", "index": 6, "request_sha256": "…", "text": …}

`index` counts prompts from 0; the hash is that of everything the result follows from (prompt, sampling, engine): a row
is kept only for the request it answers. When all prompts have been run, the rows are put into their order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import EngineInfo
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import MANIFEST
from trtllm_redrafter.errors import InputError, OutputError
from trtllm_redrafter.fsio import as_output_error
from trtllm_redrafter.locks import exclusive
from trtllm_redrafter.prompts.jsonl import dump_line
from trtllm_redrafter.run.jobs import Job
from trtllm_redrafter.scratch import partial_stem, replaced_file, sweep

Place = tuple[int, int]
"""First byte and length of a row in the file."""


class ResultsFile:
    """The file, for this process alone. `missing` leaves out what it has already, `write` adds a row, `finish` sorts.

    Earlier results stay until `missing` is called, so that an engine that cannot be loaded does not cost them.
    """

    def __init__(self, path: Path, *, regular: bool, earlier: dict[int, tuple[str | None, Place]]) -> None:
        self.kept = 0
        self._path, self._regular, self._earlier = path, regular, earlier
        self._fd: int | None = None
        self._engine = ""
        self._end = 0
        self._places: dict[int, Place] = {}
        self._running: dict[str, tuple[int, str | None]] = {}

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> Iterator[ResultsFile]:
        """Lock the file, and look at what it holds.

        With `resume`, an existing file is continued; `OutputError` when it holds something else, unless `overwrite`
        allows to start over. A file without a row is removed when the block fails.
        """
        special = path.exists() and not path.is_file()  # a pipe or a terminal
        target = path if special else Path(os.path.realpath(path))
        with nullcontext() if special else _alone(target, path):
            if target.is_file() and not resume and not overwrite:
                remedy = "pass --overwrite, --resume or another --output"
                raise OutputError("the output exists already", where=path, remedy=remedy)
            with as_output_error(path):
                earlier = {} if special or not resume else _earlier_rows(target, path, overwrite=overwrite)
            file = cls(target, regular=not special, earlier=earlier)
            try:
                yield file
            except BaseException:
                if file._fd is not None and not special and target.stat().st_size == 0:
                    target.unlink()
                raise
            finally:
                if file._fd is not None:
                    os.close(file._fd)

    def missing(self, jobs: Iterable[Job], info: EngineInfo) -> Iterator[Job]:
        """Begin to write. Yields the jobs without a result of this engine in the file; failed ones are tried again."""
        self._engine = _engine_key(info)
        mode = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if self._earlier else os.O_TRUNC)
        with as_output_error(self._path):
            self._fd = os.open(self._path, mode, 0o666)
            self._end = os.lseek(self._fd, 0, os.SEEK_END) if self._regular else 0
        return self._missing(jobs)

    def _missing(self, jobs: Iterable[Job]) -> Iterator[Job]:
        for index, job in enumerate(jobs):
            key = _request_key(job, self._engine) if job.error is None else None
            known, place = self._earlier.get(index, (None, (0, 0)))
            if key is not None and key == known:
                self._places[index] = place
                self.kept += 1
            else:
                self._running[job.where] = (index, key)
                yield job

    def write(self, job: Job) -> None:
        """Append a row; if it cannot be written whole, no part of it stays."""
        index, key = self._running.pop(job.where)
        values = job.as_dict()
        row = {"id": values.pop("id"), "source": values.pop("source"), "index": index, "request_sha256": key, **values}
        data = (dump_line(row) + "\n").encode("utf-8")
        with as_output_error(self._path):
            self._append(data)
        self._places[index] = (self._end, len(data))
        self._end += len(data)

    def finish(self) -> None:
        """All prompts have been run: put the rows into their order, and drop all others."""
        places = [self._places[index] for index in sorted(self._places)]
        ends = [0, *(first + length for first, length in places)]
        in_order = all(first == end for (first, _), end in zip(places, ends, strict=False)) and ends[-1] == self._end
        if in_order or not self._regular:
            return
        with as_output_error(self._path), self._path.open("rb") as source, replaced_file(self._path) as sorted_file:
            shutil.copymode(self._path, sorted_file)
            with sorted_file.open("wb") as target:
                for first, length in places:
                    source.seek(first)
                    target.write(source.read(length))

    def _append(self, data: bytes) -> None:
        assert self._fd is not None
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except BrokenPipeError as e:
            raise OutputError("the reader of the output has closed it", where=self._path, why=str(e)) from e
        except BaseException:
            if self._regular:
                with suppress(OSError):
                    os.ftruncate(self._fd, self._end)
            raise


@contextmanager
def _alone(target: Path, path: Path) -> Iterator[None]:
    """Keep other runs away from a file. Without a lock where none can be put beside it."""
    lock = target.with_name(f".{target.name}.lock")
    if target.exists() and not os.access(target.parent, os.W_OK):
        yield
        return
    with exclusive(lock, "the output", where=path):
        sweep(target.parent, partial_stem(target))
        yield


_ALWAYS_HASHED = (
    "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos", "stop_token_ids", "skip_special_tokens"
)  # fmt: skip
"""Options of the first version that wrote hashes. Later ones are left out if off: earlier rows stay valid."""


def _request_key(job: Job, engine: str) -> str:
    """The hash of everything a job's result follows from."""
    prompt, sampling = asdict(job.prompt), asdict(job.sampling)
    for option in fields(job.sampling):
        if option.name not in _ALWAYS_HASHED and sampling[option.name] == option.default:
            del sampling[option.name]
    request = {
        "prompt": prompt["content"],
        "chat": prompt["chat"],
        "template_kwargs": prompt["template_kwargs"],
        "sampling": sampling,
        "draft": job.draft,
    }
    text = json.dumps([engine, request], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _engine_key(info: EngineInfo) -> str:
    """What an engine's results follow from: the content of its files and how it drafts."""
    try:
        files = {name: r.sha256 for name, r in Manifest.read(info.path).files.items() if not name.endswith(MANIFEST)}
    except InputError:
        files = {"path": str(info.path.resolve())}
    return json.dumps([files, repr(info.draft_shape)], sort_keys=True)


def _earlier_rows(target: Path, path: Path, *, overwrite: bool) -> dict[int, tuple[str | None, Place]]:
    """Hash and place of the last complete row of each prompt; half a row at the end, left by a kill, is cut off."""
    rows: dict[int, tuple[str | None, Place]] = {}
    end = 0
    if not target.exists():
        return rows
    with target.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                index, key = _identity(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                if overwrite:
                    return {}
                raise OutputError(
                    f"line {number} is not a result, so the file cannot be continued", where=path,
                    why=f"a row has an index and a request_sha256 ({type(e).__name__}: {e})",
                    remedy="pass --overwrite to start over, or another --output",
                ) from e  # fmt: skip
            rows[index] = (key, (end, len(line)))
            end += len(line)
        if file.seek(0, os.SEEK_END) > end:
            file.truncate(end)
    return rows


def _identity(row: Any) -> tuple[int, str | None]:
    index, key = row["index"], row["request_sha256"]
    if type(index) is not int or index < 0 or not (key is None or isinstance(key, str)):
        raise ValueError(f"index {index!r}, request_sha256 {key!r}")
    return index, None if "error" in row else key
