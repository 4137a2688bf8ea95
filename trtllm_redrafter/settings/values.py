"""What the schema's sections are made of: kinds of values, each with the check of what was written.

A validator's message is the remedy that users read: "it should be batch sizes such as 1,4,16".
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from trtllm_redrafter.checkpoint.fields import MAX_SIZE
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.paths import text_problem
from trtllm_redrafter.prompts.messages import check_template_kwargs
from trtllm_redrafter.redrafter.config import DraftShape

T = TypeVar("T")
Positive = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Dtype = Literal["auto", "float16", "bfloat16", "float32"]
Text = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Nothing unknown, nothing converted in silence: "4" is not 4 and true is not 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def fill(options: type[T], section: Section, **others: Any) -> T:
    """An options class of a lower package, from the section's fields of the same names, and `others`."""
    fields = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    shared = (fields & type(section).model_fields.keys()) - others.keys()
    return options(**{name: getattr(section, name) for name in shared}, **others)


def _path(path: Path) -> Path:
    problem = text_problem(path)
    if problem is not None:
        raise ValueError(problem)
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from error


Directory = Annotated[Path, Field(strict=False), AfterValidator(_path)]


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("it should be auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(_device)]


def parse_grid(text: str) -> tuple[DraftShape, ...]:
    """`1x3,4x4` → shapes. Raises `ValueError` for anything else."""
    shapes = []
    for item in text.split(","):
        beams, cross, length = item.strip().partition("x")
        if not cross or not beams.isdigit() or not length.isdigit():
            raise ValueError(f"{item.strip()!r} is not BEAMSxLENGTH, as 4x4")
        shapes.append(DraftShape(int(beams), int(length)))
    return tuple(shapes)


def _checked_grid(text: str) -> str:
    parse_grid(text)
    return text


Grid = Annotated[str, AfterValidator(_checked_grid)]


def parse_batches(text: str) -> tuple[int, ...]:
    """ "1,4,16" → (1, 4, 16)."""
    return tuple(int(part) for part in text.split(","))


def _batches(text: str) -> str:
    try:
        good = min(parse_batches(text)) >= 1
    except ValueError:
        good = False
    if not good:
        raise ValueError("it should be batch sizes such as 1,4,16")
    return text


Batches = Annotated[str, AfterValidator(_batches)]


def _template_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    try:
        return check_template_kwargs(values)
    except InputError as error:
        raise ValueError(error.problem.remedy or error.problem.what) from error


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_template_kwargs)]


def _acceptance_length(value: Any) -> float | Path | None:
    """A number, or a path to what has it; one message for both."""
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, str) and value.strip():
        return Path(value).expanduser()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1.0 <= value <= sys.float_info.max:
        return float(value)
    raise ValueError("it should be tokens per step, at least 1, or the path of a report of `evaluate`")


AcceptanceLength = Annotated[float | Path | None, BeforeValidator(_acceptance_length)]
