"""Carry out a conversion plan: rank files concurrently, then config and manifest, then the rename.

    checkpoint = convert(plan_conversion(options), progress)

Reading, writing and hashing overlap, and memory stays at a few blocks: SHA-256 is the slowest of the three, so it has a
thread of its own. A file's space is reserved first: a disk that is too small says so before a byte is written. A
failure or an interrupt anywhere stops every thread at its next block and leaves no trace of the output.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.config import config_dict
from trtllm_redrafter.checkpoint.manifest import FileRecord, Manifest
from trtllm_redrafter.checkpoint.names import EOS_TOKEN_IDS, TRAINED_DRAFT_LEN, rank_file
from trtllm_redrafter.checkpoint.stored_tensor import StoredTensor, tensor_bytes
from trtllm_redrafter.conversion.plan import ConversionPlan
from trtllm_redrafter.conversion.sources import Block, RankFile, blocks
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import atomic_directory, write_json
from trtllm_redrafter.paths import open_regular
from trtllm_redrafter.progress import Progress

CHUNK_BYTES = 2**20
"""One read and write; it stays in the CPU's cache between the two and the hash."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

RING = 8
"""Chunks between the writer and the hasher."""


def convert(plan: ConversionPlan, progress: Progress, *, on_complete: Callable[[Path], None] | None = None) -> Path:
    """Write the checkpoint; returns its path. All or nothing. `on_complete`: see `atomic_directory`."""
    output = plan.options.output
    with atomic_directory(output, overwrite=plan.options.overwrite, on_complete=on_complete) as work:
        ranks, inputs = _write_ranks(plan, work, progress)
        records = {rank_file(work, rank).name: record for rank, record in ranks.items()}
        write_json(work / "config.json", config_dict(plan.config))
        records["config.json"] = FileRecord.of(work / "config.json")
        for source, name in plan.copies:
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, work / name)
            records[name] = FileRecord.of(work / name)
        _manifest(plan, records, inputs).write(work)
    return output


def _write_ranks(
    plan: ConversionPlan, work: Path, progress: Progress
) -> tuple[dict[int, FileRecord], dict[Path, FileRecord]]:
    """All rank files, and the hashes of the inputs computed beside them."""
    lock = threading.Lock()
    written = Meter(progress, "convert", plan.weight_bytes, lock)
    hashed = Meter(progress, "hash inputs", sum(path.stat().st_size for path in plan.inputs), lock)
    workers = min(plan.options.workers, len(plan.ranks))
    with ThreadPoolExecutor(workers + 1, thread_name_prefix="convert") as pool:
        inputs = pool.submit(hash_inputs, plan.inputs, hashed)
        ranks = {rank.rank: pool.submit(write_rank, rank, rank_file(work, rank.rank), written) for rank in plan.ranks}
        try:
            _wait_for([inputs, *ranks.values()])
        except BaseException:
            written.stop()
            hashed.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        return {rank: future.result() for rank, future in ranks.items()}, inputs.result()


def _wait_for(futures: list[Future[Any]]) -> None:
    """Return when all are done, or raise the first failure at once."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        error = future.exception()
        if error is not None and not isinstance(error, Cancelled):
            raise error


def _manifest(plan: ConversionPlan, records: dict[str, FileRecord], inputs: dict[Path, FileRecord]) -> Manifest:
    """`derived` has only what config.json has no key for."""
    derived: dict[str, Any] = {EOS_TOKEN_IDS: list(plan.base.eos_token_ids)}
    sections: dict[str, Any] = {
        "base": {
            "path": str(plan.options.base),
            "kind": plan.base.kind,
            "tokenizer_sha256": plan.base.tokenizer_sha256,
            "weights_sample": plan.base.weights_sample,
            "files": _relative(plan.options.base, plan.base.files, inputs),
        }
    }
    if plan.drafter is not None:
        derived[TRAINED_DRAFT_LEN] = plan.drafter.trained_draft_len
        sections["drafter"] = {
            "path": str(plan.drafter.path),
            "trained_for": dict(plan.drafter.base_model or {}),
            "files": _relative(plan.drafter.path, plan.drafter.files, inputs),
        }
    return Manifest(
        kind="checkpoint",
        inputs=sections,
        options=plan.options.as_dict(),
        derived=derived,
        files=dict(sorted(records.items())),
        notes=plan.notes,
    )


def _relative(directory: Path, files: tuple[Path, ...], records: dict[Path, FileRecord]) -> dict[str, Any]:
    return {path.relative_to(directory).as_posix(): records[path].as_dict() for path in files}


class Cancelled(Exception):
    """Another thread failed, or the user interrupted: stop."""


class Meter:
    """Counts bytes from several threads for one progress bar, and tells them to stop.

    Meters that share `lock` never call `progress` at the same time; it need not be thread-safe.
    """

    def __init__(self, progress: Progress, stage: str, total: int, lock: threading.Lock) -> None:
        self._progress, self._stage, self._total = progress, stage, total
        self._lock = lock
        self._done = 0
        self._shown = 0
        self._stop = threading.Event()

    def add(self, count: int) -> None:
        if self._stop.is_set():
            raise Cancelled
        with self._lock:
            self._done += count
            if self._done - self._shown >= 16 * 2**20 or self._done == self._total:
                self._shown = self._done
                self._progress(self._stage, self._done, self._total, "bytes")

    def stop(self) -> None:
        self._stop.set()


class Hasher:
    """SHA-256 in its own thread. Data goes through a fixed set of buffers: take one, fill it, put it back."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._filled: queue.Queue[tuple[bytearray, int] | None] = queue.Queue()
        self._free: queue.Queue[bytearray] = queue.Queue()
        for _ in range(RING):
            self._free.put(bytearray(CHUNK_BYTES))
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)
        self._thread.start()

    def take(self) -> bytearray:
        """A buffer of `CHUNK_BYTES` that is not in use; waits until the hasher has freed one."""
        return self._free.get()

    def put(self, buffer: bytearray, count: int) -> None:
        """Hash the first `count` bytes of a taken buffer."""
        self._filled.put((buffer, count))

    def finish(self) -> str:
        """The hex digest of everything; ends the thread."""
        self._filled.put(None)
        self._thread.join()
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (item := self._filled.get()) is not None:
            buffer, count = item
            self._digest.update(memoryview(buffer)[:count])
            self._free.put(buffer)


def write_rank(plan: RankFile, path: Path, meter: Meter) -> FileRecord:
    """Write one rank file from its plan and return its size and hash."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    hasher = Hasher()
    try:
        reserve(fd, plan.size)
        at = _write_data(fd, memoryview(plan.header), 0, hasher, meter)
        for tensor in plan.tensors:
            end = at + tensor.nbytes
            for block in blocks(tensor):
                at += _write_block(fd, block, at, hasher, meter)
            assert end == at
    finally:
        digest = hasher.finish()
        os.close(fd)
    return FileRecord(at, digest).with_sample(path)


def reserve(fd: int, size: int) -> None:
    """Reserve the disk space now, if the file system can."""
    try:
        os.posix_fallocate(fd, 0, max(size, 1))
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
            raise


def _write_block(fd: int, block: Block, at: int, hasher: Hasher, meter: Meter) -> int:
    """Write a block at its place and return its size."""
    if isinstance(block, StoredTensor):
        return _write_stored(fd, block, at, hasher, meter)
    return _write_data(fd, tensor_bytes(block), at, hasher, meter)


def _write_stored(fd: int, tensor: StoredTensor, at: int, hasher: Hasher, meter: Meter) -> int:
    for done in range(0, tensor.nbytes, CHUNK_BYTES):
        count = min(CHUNK_BYTES, tensor.nbytes - done)
        buffer = hasher.take()
        tensor.read_into(memoryview(buffer)[:count], done)
        _write_chunk(fd, buffer, count, at + done, hasher, meter)
    return tensor.nbytes


def _write_data(fd: int, data: memoryview, at: int, hasher: Hasher, meter: Meter) -> int:
    for done in range(0, len(data), CHUNK_BYTES):
        count = min(CHUNK_BYTES, len(data) - done)
        buffer = hasher.take()
        buffer[:count] = data[done : done + count]
        _write_chunk(fd, buffer, count, at + done, hasher, meter)
    return len(data)


def _write_chunk(fd: int, buffer: bytearray, count: int, at: int, hasher: Hasher, meter: Meter) -> None:
    chunk, done = memoryview(buffer)[:count], 0
    while done < count:
        done += os.pwrite(fd, chunk[done:], at + done)
    hasher.put(buffer, count)
    meter.add(count)


def hash_inputs(paths: Sequence[Path], meter: Meter) -> dict[Path, FileRecord]:
    """SHA-256 of the input files, for the manifest; runs beside the writing."""
    found = {}
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for path in paths:
        digest, size = hashlib.sha256(), 0
        with open_regular(path) as file:
            while count := file.readinto(buffer):  # type: ignore[attr-defined]
                digest.update(buffer[:count])
                size += count
                meter.add(count)
        found[path] = FileRecord(size, digest.hexdigest())
        _check_hub_blob(path, found[path])
    return found


def _check_hub_blob(path: Path, record: FileRecord) -> None:
    """A Hugging Face cache names large files by their SHA-256: a flipped bit shows here, before the rename."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and blob.name != record.sha256:
        raise InputError(
            "the file is not what was downloaded",
            where=path,
            why=f"the cache expects SHA-256 {blob.name[:16]}…, it has {record.sha256[:16]}…",
            remedy="delete it from the cache and download it again",
        )
