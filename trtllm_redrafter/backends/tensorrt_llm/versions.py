"""TensorRT-LLM releases as data: what ReDrafter can and cannot do in each, and which bugs it has there.

ReDrafter changed several times while its checkpoint format did not: the same files meant another recurrence before
0.14, and too many drafts were accepted before April 2025. Refusals and warnings are made from the tables below.

    release_for("1.2.1").status            # Status.TARGET
    release_for("1.3.0rc22").status        # Status.REFUSED: the TensorRT engine workflow was removed
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

TARGET = "1.2.1"
CONTAINER = "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"

_ALL_FAMILIES = ("llama", "qwen")


class Status(enum.Enum):
    """What this package does with a release."""

    TARGET = "target"
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(frozen=True)
class Release:
    """Releases from `first` up to, not including, `until` ("" is open)."""

    first: str
    until: str
    status: Status
    families: tuple[str, ...]
    """Base model classes that can carry a drafter."""
    fp8_base: bool
    notes: tuple[str, ...]
    """Known bugs and changes, newest first; the first one is the reason of a refusal."""


RELEASES: tuple[Release, ...] = (
    Release("", "0.12", Status.REFUSED, (), False, ("ReDrafter appeared in 0.12",)),
    Release(
        "0.12", "0.14", Status.REFUSED, ("llama",), False,
        ("the drafter's recurrence lacks SiLU and the top-50 cut (corrected in 0.14): trained drafters run as "
         "another function",),
    ),
    Release(
        "0.14", "0.20", Status.REFUSED, ("llama",), False,
        ("draft probabilities are not normalised (corrected in April 2025): with many beams too much is accepted",
         "checkpoints name the class ReDrafterForCausalLM, which later releases do not know"),
    ),
    Release(
        "0.20", "1.0", Status.REFUSED, ("llama",), False,
        ("checkpoints name the class ReDrafterForCausalLM and a LLaMA base only",),
    ),
    Release("1.0", "1.2", Status.ACCEPTED, _ALL_FAMILIES, True, ("the tested target is 1.2.1",)),
    Release("1.2", "1.3", Status.TARGET, _ALL_FAMILIES, True, ()),
    Release(
        "1.3", "", Status.REFUSED, (), False,
        ("the TensorRT engine workflow, and ReDrafter with it, is removed during 1.3",),
    ),
)  # fmt: skip
"""In order, without gaps."""

REQUIREMENTS: Mapping[str, str] = {
    "torch": ">=2.9.1,<=2.10.0a0",
    "tensorrt": ">=10.14.1,<10.15",
    "transformers": "==4.57.3",
    "numpy": "<2",
}
"""What the 1.2.1 wheel pins; `doctor` compares installed versions with it before anything is imported."""

PYTHON_VERSIONS = ("3.10", "3.12")
"""Wheels of 1.2.1 exist for these only (Linux)."""

MIN_COMPUTE_CAPABILITY = (8, 0)
MIN_DRIVER = 580
"""CUDA 13 needs this driver branch, or a data-centre driver with its compatibility package."""

NVIDIA_EXAMPLE_BASES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
"""Bases that NVIDIA's own ReDrafter converter accepts; others use the same two classes without one."""


def parse_version(text: str) -> tuple[int, ...]:
    """`1.2.0rc2` → (1, 2, 0). Pre-releases count as the release they lead to."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def same_line(a: str, b: str) -> bool:
    """Do two versions agree in major and minor number? Engines are exchanged within a patch release only."""
    return parse_version(a)[:2] == parse_version(b)[:2]


def release_for(version: str) -> Release | None:
    """The table's row; None for text that is no version number."""
    number = parse_version(version)
    if not number:
        return None
    for release in RELEASES:
        if number >= parse_version(release.first) and (not release.until or number < parse_version(release.until)):
            return release
    return None


def satisfies(version: str, requirement: str) -> bool:
    """Is `version` within a requirement such as `>=2.9.1,<=2.10.0a0`? Local suffixes (`+cu130`) do not count."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(requirement).contains(version.split("+")[0], prereleases=True)
