"""Typed reading of JSON that reports all wrong or missing keys together: key by key, or against a schema.

fields = FieldReader({"hidden_size": "64"}, "config.json")
fields.size("hidden_size")      # 1, and fields.problems says that hidden_size is '64' and must be a number

class Limits(Schema):
    max_batch_size: Size

limits = validated(Limits, read_json(path), where=path, what="the engine's config.json is not usable", remedy="...")
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtllm_redrafter.errors import InputError, Problem, brief
from trtllm_redrafter.redrafter.config import MAX_DRAFT_LEN

MAX_SIZE = 2**31 - 1
"""Upper limit of all sizes of models, engines and requests; kernels and TensorRT-LLM use 32-bit integers."""

Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]

LIMITS: Mapping[str, int] = {
    "num_hidden_layers": 10_000,
    "num_draft_layers": 1_000,
    "redrafter_num_layers": 1_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "head_size": 2**16,
    "hidden_size": 2**20,
    "redrafter_hidden_size": 2**20,
    "intermediate_size": 2**24,
    "exit_dim": 2**21,
    "redrafter_exit_dim": 2**21,
    "vocab_size": 2**26,
    "draft_len": MAX_DRAFT_LEN,
    "redrafter_draft_len_per_beam": MAX_DRAFT_LEN,
    "num_beams": MAX_SIZE,
}
"""Far above any existing model, and low enough that planning work per layer cannot exhaust the memory."""

_MAX_NUMBER = 1e38
"""About the largest float32."""

_MISSING: Any = object()
_EDIT = "correct the file, or download it again"

_LISTED = 6
"""Wrong keys of a schema that one message names."""


class FieldReader:
    """Reads keys of one JSON object. A null counts as missing. `read` collects the keys that were asked for."""

    def __init__(self, values: Mapping[str, Any], where: str | Path) -> None:
        self.values = values
        self.where = where
        self.problems: list[Problem] = []
        self.read: set[str] = set()

    def problem(self, what: str, *, why: str | None = None, remedy: str | None = None) -> None:
        self.problems.append(Problem(what, str(self.where), why, remedy))

    def size(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number from `minimum` to the key's limit in `LIMITS`."""
        value, limit = self._get(key, default), LIMITS.get(key, MAX_SIZE)
        if type(value) is int and minimum <= value <= limit:
            return value
        self._wrong(key, value, f"a whole number from {minimum} to {limit} is needed")
        return minimum

    def optional_size(self, key: str) -> int | None:
        self.read.add(key)
        return None if self.values.get(key) is None else self.size(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._get(key, default)
        if type(value) in (int, float) and 0 < value < _MAX_NUMBER:  # false for NaN
            return float(value)
        self._wrong(key, value, "a positive number is needed")
        return 1.0

    def flag(self, key: str, default: bool | None) -> bool:
        value = self._get(key, default)
        if isinstance(value, bool):
            return value
        self._wrong(key, value, "true or false is needed")
        return False

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if isinstance(value, str) and value:
            return value
        self._wrong(key, value, "a name is needed")
        return ""

    def choice(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        value = self._get(key, default)
        if isinstance(value, str) and value in choices:
            return value
        self._wrong(key, value, f"one of {', '.join(choices)} is needed")
        return next(iter(choices))

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty if missing."""
        value = self._get(key, {})
        if isinstance(value, dict):
            return value
        self._wrong(key, value, "an object is needed")
        return {}

    def _get(self, key: str, default: Any) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        if value is None:
            value = _MISSING if default is None else default
        return value

    def _wrong(self, key: str, value: Any, needed: str) -> None:
        what = f"{key} is missing" if value is _MISSING else f"{key} is {brief(value)}"
        self.problem(what, why=needed, remedy=_EDIT)


class Schema(BaseModel):
    """A JSON object. Unknown keys are kept, and types are strict (`"4"` is not 4, true is not 1)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


M = TypeVar("M", bound=BaseModel)


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
    return f"{key} is {brief(entry['input'])}, {entry['msg'].replace('Input should', 'it should', 1)}"
