"""What every section of the schema is made of."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from trtllm_redrafter.checkpoint.fields import MAX_SIZE
from trtllm_redrafter.paths import text_problem


def _path(path: Path) -> Path:
    problem = text_problem(path)
    if problem is not None:
        raise ValueError(problem)
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from error


T = TypeVar("T")

Directory = Annotated[Path, Field(strict=False), AfterValidator(_path)]
Positive = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Text = Annotated[str, StringConstraints(min_length=1)]


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("it should be auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(_device)]


class Section(BaseModel):
    """Nothing unknown, nothing converted in silence: "4" is not 4 and true is not 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def fill(options: type[T], section: Section, **others: Any) -> T:
    """A dataclass of a lower layer, which knows no recipe: `others`, and from the section the fields it shares."""
    fields = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    shared = (fields & type(section).model_fields.keys()) - others.keys()
    return options(**{name: getattr(section, name) for name in shared}, **others)
