"""Typed reading of JSON fields that collects every problem instead of stopping at the first.

fields = FieldReader({"hidden_size": "64"}, "config.json")
fields.size("hidden_size")      # 1, and fields.problems says that hidden_size is '64' and must be a number
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import Problem

_MISSING: Any = object()
_EDIT = "correct the file, or download it again"


class FieldReader:
    """Reads keys of one JSON object. A null counts as missing. `read` remembers which keys were asked for."""

    def __init__(self, values: Mapping[str, Any], where: str | Path) -> None:
        self.values = values
        self.where = where
        self.problems: list[Problem] = []
        self.read: set[str] = set()

    def problem(self, what: str, *, why: str | None = None, remedy: str | None = None) -> None:
        self.problems.append(Problem(what, str(self.where), why, remedy))

    def size(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self._get(key, default)
        if type(value) is int and value >= minimum:
            return value
        self._wrong(key, value, f"a whole number of at least {minimum} is needed")
        return minimum

    def optional_size(self, key: str) -> int | None:
        self.read.add(key)
        return None if self.values.get(key) is None else self.size(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._get(key, default)
        if type(value) in (int, float) and math.isfinite(value) and value > 0:
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
        """An object; empty when missing."""
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
        what = f"{key} is missing" if value is _MISSING else f"{key} is {value!r}"
        self.problem(what, why=needed, remedy=_EDIT)
