"""Turn the lines of trtllm-build's log into what it is doing: phase, rank, and how far it is by the last build's time.

The phrases are those of TensorRT-LLM's and TensorRT's loggers. A phrase that changes in a release costs the progress
display its detail, never the build.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PHASES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), phase)
    for pattern, phase in (
        (r"Set \w+ to ", "reading the configuration"),
        (r"Loading (weights|checkpoint|engine)|Reading weights|initialize the weights", "loading weights"),
        (r"Total time of constructing network|optimization profiles added", "building the network"),
        (r"Build TensorRT engine|timing cache in use|Compiler backend is used during engine build", "compiling"),
        (r"Engine generation completed", "engine compiled"),
        (r"Serializing engine to", "writing the engine"),
        (r"Engine serialized", "engine written"),
        (r"Total time of building all engines", "done"),
    )
)


@dataclass
class BuildProgress:
    """Fed with lines; `headline` is what to show."""

    ranks: int
    phase: str = "starting"
    written: int = 0

    def line(self, text: str) -> bool:
        """True when the phase changed."""
        before = (self.phase, self.written)
        for pattern, phase in _PHASES:
            if pattern.search(text):
                self.phase = phase
                self.written += phase == "engine written"
                break
        return (self.phase, self.written) != before

    @property
    def headline(self) -> str:
        return f"build: {self.phase}" + (f", rank {min(self.written, self.ranks - 1)}" if self.ranks > 1 else "")


def warnings_in(log: str, limit: int = 20) -> list[str]:
    """TensorRT-LLM's own warnings, each once, without time stamps: they go into the manifest."""
    found = dict.fromkeys(
        match.group(1).strip() for match in re.finditer(r"\[TRT-LLM\] \[W\] (.*)", log) if match.group(1).strip()
    )
    return list(found)[:limit]
