"""Write a rank file: reading, writing and hashing overlap, and memory stays at a few blocks.

SHA-256 is the slowest of the three, so it has a thread of its own. The file's space is reserved first: a disk that
is too small says so before a byte is written, and the file system does not search for room in between.

    record = write_rank(plan, Path("rank0.safetensors"), files, meter)     # FileRecord(size, sha256)
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from trtllm_redrafter.checkpoint.manifest import FileRecord
from trtllm_redrafter.checkpoint.safetensors_io import tensor_bytes
from trtllm_redrafter.convert.shards import Block, Extent, RankPlan, blocks
from trtllm_redrafter.convert.sources import OpenFiles
from trtllm_redrafter.progress import Progress

CHUNK_BYTES = 2**20
"""One read and write; it stays in the CPU's cache between the two and the hash."""

RING = 8
"""Chunks between the writer and the hasher."""


class Cancelled(Exception):
    """Another thread failed or the user interrupted; whoever sees this just stops."""


class Meter:
    """Counts bytes from several threads for one progress bar, and carries the order to stop."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total = progress, stage, total
        self._lock = threading.Lock()
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
    """SHA-256 in its own thread, fed through a bounded queue."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._queue: queue.Queue[tuple[memoryview, bytearray | None] | None] = queue.Queue(RING)
        self.free: queue.Queue[bytearray] = queue.Queue()
        for _ in range(RING):
            self.free.put(bytearray(CHUNK_BYTES))
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)
        self._thread.start()

    def update(self, data: memoryview, buffer: bytearray | None = None) -> None:
        """Hash `data`; `buffer`, which holds it, goes back to `free` afterwards."""
        self._queue.put((data, buffer))

    def finish(self) -> str:
        """The hex digest of everything; ends the thread."""
        self._queue.put(None)
        self._thread.join()
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            data, buffer = item
            self._digest.update(data)
            if buffer is not None:
                self.free.put(buffer)


def write_rank(plan: RankPlan, path: Path, files: OpenFiles, meter: Meter) -> FileRecord:
    """Write one rank file from its plan and return its size and hash."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    hasher = Hasher()
    try:
        reserve(fd, plan.layout.file_size)
        header = memoryview(plan.layout.header_bytes)
        _write(fd, header, 0, hasher, meter)
        at = len(header)
        for entry in plan.layout.entries:
            assert entry.begin == at
            for block in blocks(plan.tensors[entry.name]):
                at += _write_block(fd, block, at, files, hasher, meter)
            assert entry.end == at
    finally:
        digest = hasher.finish()
        os.close(fd)
    return FileRecord(at, digest)


def reserve(fd: int, size: int) -> None:
    """Take the disk space now; file systems that cannot are left to find it while writing."""
    try:
        os.posix_fallocate(fd, 0, max(size, 1))
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
            raise


def _write_block(fd: int, block: Block, at: int, files: OpenFiles, hasher: Hasher, meter: Meter) -> int:
    if isinstance(block, Extent):
        return _copy(fd, block, at, files, hasher, meter)
    data = tensor_bytes(block)
    _write(fd, data, at, hasher, meter)
    return len(data)


def _copy(fd: int, extent: Extent, at: int, files: OpenFiles, hasher: Hasher, meter: Meter) -> int:
    for begin in range(extent.begin, extent.end, CHUNK_BYTES):
        buffer = hasher.free.get()
        chunk = memoryview(buffer)[: min(CHUNK_BYTES, extent.end - begin)]
        files.read_into(extent.path, chunk, begin)
        _write(fd, chunk, at + begin - extent.begin, hasher, meter, buffer)
    return extent.end - extent.begin


def _write(fd: int, data: memoryview, at: int, hasher: Hasher, meter: Meter, buffer: bytearray | None = None) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)
    hasher.update(data, buffer)
    meter.add(len(data))


def hash_inputs(paths: Sequence[Path], meter: Meter) -> dict[Path, FileRecord]:
    """SHA-256 of the input files, for the manifest; runs beside the writing."""
    found = {}
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for path in paths:
        digest, size = hashlib.sha256(), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
                meter.add(count)
        found[path] = FileRecord(size, digest.hexdigest())
    return found
