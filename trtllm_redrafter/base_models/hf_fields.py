"""Bring a Hugging Face config.json into one form, whichever version of transformers wrote it.

transformers 5 renamed `torch_dtype` to `dtype` and moved `rope_theta` and `rope_scaling` into `rope_parameters`; some
files have both. A field that is missing in one place is taken from the other, and two values that disagree are refused,
since versions of transformers differ in which of them they use.

    fields, problems = one_form(read_json(path), where=path)
    fields["rope_theta"], fields.get("rope_scaling"), fields.get("dtype")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import Problem

_WHY = "the two are one setting under two names, and versions of transformers differ in which one they read"
_TOP = "top-level"
_MODERN, _LEGACY = "rope_parameters", "rope_scaling"
_MOVED = ("partial_rotary_factor",)
"""Other top-level fields of transformers 4, besides `rope_theta`, that transformers 5 has in `rope_parameters`."""
_KIND = ("rope_type", "type")


class _Merge:
    """Takes one value from several places, and records a problem where values disagree."""

    def __init__(self, where: Path) -> None:
        self._where = str(where)
        self.problems: list[Problem] = []

    def one(self, name: str, places: Mapping[str, Any]) -> Any:
        """The first non-null value, in the order of `places`."""
        stated = [(place, value) for place, value in places.items() if value is not None]
        if not stated:
            return None
        first_place, first = stated[0]
        for place, value in stated[1:]:
            if value != first:
                what = f"{name} is {first!r} ({first_place}) and {value!r} ({place})"
                remedy = "correct the file: keep the value the model was trained with"
                self.problems.append(Problem(what, self._where, _WHY, remedy))
                break
        return first


def one_form(raw: Mapping[str, Any], *, where: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The fields in transformers 4's places (except `dtype`), and all contradictions.

    `dtype` has no `torch.` prefix; `rope_theta` and `partial_rotary_factor` are at the top level, the other rotary
    settings in `rope_scaling`. Rotary settings that are no object, or differ by kind of layer, are left unchanged.
    """
    fields, merge = dict(raw), _Merge(where)
    dtype = merge.one("dtype", {key: _dtype_name(fields.pop(key, None)) for key in ("dtype", "torch_dtype")})
    if dtype is not None:
        fields["dtype"] = dtype
    modern, legacy = raw.get(_MODERN), raw.get(_LEGACY)
    if all(value is None or _is_flat(value) for value in (modern, legacy)):
        _merge_rope(fields, modern or {}, legacy or {}, merge)
    return fields, merge.problems


def _dtype_name(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(inner, dict) for inner in value.values())


def _merge_rope(fields: dict[str, Any], modern: Mapping[str, Any], legacy: Mapping[str, Any], merge: _Merge) -> None:
    fields.pop(_MODERN, None)
    inside = {_MODERN: modern, _LEGACY: legacy}
    for key in ("rope_theta", *_MOVED):
        value = merge.one(key, {_TOP: fields.get(key)} | {name: part.get(key) for name, part in inside.items()})
        if value is not None:
            fields[key] = value
    kind = merge.one(
        "the rotary scaling", {f"{name}.{key}": part.get(key) for name, part in inside.items() for key in _KIND}
    )
    keys = dict.fromkeys(k for part in inside.values() for k in part if k not in ("rope_theta", *_MOVED))
    scaling = {
        k: kind if k in _KIND else merge.one(k, {name: part.get(k) for name, part in inside.items()}) for k in keys
    }
    original = "original_max_position_embeddings"
    if kind == "llama3":
        value = merge.one(original, {_TOP: fields.get(original), "rotary scaling": scaling.get(original)})
        scaling = scaling if value is None else scaling | {original: value}
    fields[_LEGACY] = {key: value for key, value in scaling.items() if value is not None} or None
