"""The report: all checks, and what they mean for each backend."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKENDS = ("torch", "tensorrt-llm")


class State(enum.Enum):
    """The outcome of a check."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One check and the backends that need it to pass."""

    name: str
    state: State
    found: str
    backends: tuple[str, ...]
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "state": self.state.value, "backends": list(self.backends)}


@dataclass(frozen=True)
class Needs:
    """A recipe's requirements for the machine that builds and runs it."""

    version: str
    gpu: str
    ranks: int
    output: Path
    workers: int
    """Ranks built at the same time."""
    disk_bytes: int
    host_bytes: int
    """Main memory of a build, all workers together."""


@dataclass(frozen=True)
class DoctorReport:
    """All checks; a backend can be used if none of its checks failed."""

    checks: tuple[Check, ...]

    def serves(self, backend: str) -> bool:
        return not any(check.state is State.FAIL and backend in check.backends for check in self.checks)

    def render(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.state.value:<4}  {check.name:<{width}}  {check.found}")
            if check.remedy and check.state is not State.OK:
                lines.append(f"      {'':<{width}}  remedy: {check.remedy}")
        lines.append("")
        for backend in BACKENDS:
            reasons = [c.name for c in self.checks if c.state is State.FAIL and backend in c.backends]
            answer = "can be used here" if not reasons else "cannot: " + ", ".join(reasons)
            lines.append(f"{backend:<12}  {answer}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        serves = {backend: self.serves(backend) for backend in BACKENDS}
        return {"checks": [check.as_dict() for check in self.checks], "serves": serves}
