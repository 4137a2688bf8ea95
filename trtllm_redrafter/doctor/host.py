"""How much main memory this host, container or job may use, and whether this is a container.

Inside a container or a Slurm job, the machine's own figures are misleading: a build is killed at the limit of its
control group (cgroup), however much memory the machine has.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trtllm_redrafter.memory import physical_memory

_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
_LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}
"""Controller in /proc/self/cgroup (none in version 2) → the file with the limit."""


@dataclass(frozen=True)
class MainMemory:
    """In bytes. `limit` is the cgroup's, or None if there is none below the machine's total."""

    total: int
    available: int
    limit: int | None

    @property
    def usable(self) -> int:
        return self.total if self.limit is None else self.limit

    @property
    def free(self) -> int:
        """Currently available memory."""
        return min(self.available, self.usable)


def main_memory(root: Path = Path("/")) -> MainMemory:
    """Memory of this machine; `root` is a different directory in tests."""
    total = physical_memory()
    limits = [limit for limit in _group_limits(root) if limit < total]
    return MainMemory(total, min(total, _available(root) or total), min(limits) if limits else None)


def inside_container() -> bool:
    return any(Path(mark).exists() for mark in _CONTAINER_MARKS)


def shared_memory_bytes() -> int | None:
    """Size of /dev/shm, which NCCL uses between ranks; containers have 64 MB by default."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def _available(root: Path) -> int | None:
    """Linux's `MemAvailable`; None on other systems."""
    for line in _lines(root / "proc" / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _group_limits(root: Path) -> Iterator[int]:
    """Limits of this process's cgroup and of its parents, all of which apply."""
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, group = line.split(":", 2)
        for controller in controllers.split(","):
            if controller not in _LIMITS:
                continue
            top = root / "sys" / "fs" / "cgroup" / controller
            place = top / group.strip("/")
            for folder in (place, *place.parents):
                yield from (int(text) for text in _lines(folder / _LIMITS[controller]) if text.isdigit())
                if folder == top:
                    break


def _lines(file: Path) -> list[str]:
    """Lines of a file; [] if there is none."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
