"""Validate JSON files against a schema; one `InputError` lists all wrong or missing keys.

class Limits(Schema):
    max_batch_size: Size

limits = validated(Limits, read_json(path), where=path, what="the engine's config.json is not usable")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtllm_redrafter.checkpoint.fields import MAX_SIZE
from trtllm_redrafter.errors import InputError

M = TypeVar("M", bound=BaseModel)
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]

_SHOWN, _LISTED = 60, 6


class Schema(BaseModel):
    """A JSON object. Unknown keys are kept, and types are strict (`"4"` is not 4, true is not 1)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


def validated(schema: type[M], values: Mapping[str, Any], *, where: Path, what: str, remedy: str) -> M:
    """`values` as an instance of `schema`; `InputError` lists all wrong keys."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        found = [_sentence(entry) for entry in error.errors(include_url=False)]
    more = [] if len(found) <= _LISTED else [f"and {len(found) - _LISTED} more"]
    raise InputError(what, where=where, why="; ".join([*found[:_LISTED], *more]), remedy=remedy)


def _sentence(entry: Any) -> str:
    key = ".".join(str(part) for part in entry["loc"]) or "the file"
    if entry["type"] == "missing":
        return f"{key} is missing"
    shown = repr(entry["input"])
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
    return f"{key} is {shown}, {entry['msg'].replace('Input should', 'it should', 1)}"
