"""Merge recipe sources, layer over layer, and remember where every value came from.

    resolved = resolve([Layer(Origin("file", "demo.yaml"), {"convert": {"num_beams": 4}}),
                        Layer(Origin("flag", "--num-beams"), {"convert": {"num_beams": 2}})])
    resolved.recipe.convert.num_beams           # 2
    resolved.origins["convert.num_beams"]       # flag --num-beams
    resolved.origins["convert.tp_size"]         # default

A later layer wins. An unknown key is refused, with the nearest known one, and all problems of all layers are
reported together: a mistyped `num_beam: 8` must not silently run with the default.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trtllm_redrafter.errors import Problem, UsageError, raise_together
from trtllm_redrafter.settings.schema import SECTIONS, Recipe, keys


@dataclass(frozen=True)
class Origin:
    """Where a value came from: default, preset, file, flag, or derived from other values."""

    kind: str
    detail: str = ""

    def render(self) -> str:
        return f"{self.kind} {self.detail}".rstrip()


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Layer:
    """One source: nested values as they were written."""

    origin: Origin
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Resolved:
    """A valid recipe, and the origin of each of its dotted keys."""

    recipe: Recipe
    origins: Mapping[str, Origin]

    def value(self, key: str) -> Any:
        section, _, name = key.rpartition(".")
        return getattr(getattr(self.recipe, section) if section else self.recipe, name)

    def is_default(self, key: str) -> bool:
        return self.origins[key].kind == "default"

    def derive(self, values: Mapping[str, Any], why: str) -> Resolved:
        """The same recipe with derived values filled in, marked as such."""
        return resolve_more(self, [Layer(Origin("derived", why), nest(values))])

    def rows(self, *sections: str) -> list[tuple[str, str, str]]:
        """(key, value, origin) to be shown, for every key or those of some sections ("" is the top level)."""
        return [
            (key, show(self.value(key)), origin.render())
            for key, origin in self.origins.items()
            if not sections or key.rpartition(".")[0] in sections
        ]

    def render(self, *sections: str) -> str:
        """The rows as aligned text."""
        rows = self.rows(*sections)
        key_width = max(len(key) for key, _, _ in rows)
        value_width = min(48, max(len(value) for _, value, _ in rows))
        return "\n".join(f"{key:<{key_width}}  {value:<{value_width}}  {origin}" for key, value, origin in rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            key: {"value": plain(self.value(key)), "origin": origin.render()} for key, origin in self.origins.items()
        }


def resolve(layers: Sequence[Layer]) -> Resolved:
    """Merge layers, later over earlier, and validate; `UsageError` names everything that is wrong."""
    defaults = Resolved(Recipe(), dict.fromkeys(keys(), DEFAULT))
    return resolve_more(defaults, layers)


def resolve_more(under: Resolved, layers: Sequence[Layer]) -> Resolved:
    """Merge more layers over a resolved recipe."""
    problems: list[Problem] = []
    values = {key: under.value(key) for key in under.origins}
    origins = dict(under.origins)
    for layer in layers:
        for key, value in _flatten(layer, problems):
            values[key], origins[key] = value, layer.origin
    recipe = _validate(values, origins, problems)
    raise_together(UsageError, problems, "the recipe is not valid")
    assert recipe is not None
    return Resolved(recipe, origins)


def _flatten(layer: Layer, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """Dotted keys of a layer; what is not in the schema becomes a problem."""
    where, known = layer.origin.render(), keys()
    for name, value in layer.values.items():
        if name in SECTIONS:
            if value is None:
                continue  # `run:` with nothing below it
            if not isinstance(value, Mapping):
                why = f"it is {show(value)}"
                problems.append(Problem(f"{name} is a section", where, why, f"write its keys below it: {name}.…"))
                continue
            entries = [(f"{name}.{key}", v) for key, v in value.items()]
        else:
            entries = [(str(name), value)]
        for key, entry in entries:
            if key in known:
                yield key, entry
            else:
                problems.append(Problem(f"unknown key {key!r}", where, remedy=_advice(key)))


def _advice(key: str) -> str:
    """The nearest known key: the same name in another section, else a similar one in this section, else any."""
    if key.endswith("pp_size"):
        return "use convert.tp_size; layers stay together, because the drafter needs embedding and LM head on every GPU"
    known = list(keys())
    section, _, leaf = key.rpartition(".")
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf]
    here = [k for k in [*known, *SECTIONS] if k.rpartition(".")[0] == section]
    leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
    near_leaf = [leaves[name] for name in difflib.get_close_matches(leaf, list(leaves), 1)]
    candidates = elsewhere or difflib.get_close_matches(key, here, 1) or near_leaf
    if not candidates:
        return "remove it; `pipeline --dry-run` lists every known key"
    return "did you mean " + " or ".join(repr(c) for c in candidates) + "?"


def _validate(values: Mapping[str, Any], origins: Mapping[str, Origin], problems: list[Problem]) -> Recipe | None:
    try:
        return Recipe.model_validate(nest(values))
    except ValidationError as error:
        found: dict[str, Problem] = {}
        for entry in error.errors(include_url=False):
            key = ".".join(str(part) for part in entry["loc"])
            key = next((k for k in origins if key == k or key.startswith(k + ".")), key)
            what = f"{key} is {show(values.get(key))}"
            found[key] = Problem(
                what,
                origins[key].render() if key in origins else None,
                remedy=_plainly(entry["msg"]),
            )
        problems.extend(found.values())
    return None


def _plainly(message: str) -> str:
    """Pydantic's sentence as a remedy."""
    for start in ("Input should", "String should"):
        message = message.replace(start, "it should", 1)
    if "not a valid path" in message:
        return "it should be a path, written as a text"
    return message.removeprefix("Value error, ")


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"run.seed": 1} → {"run": {"seed": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def show(value: Any) -> str:
    """A value for people: as it would be written in YAML, near enough."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return repr(value) if not value or value != value.strip() or len(value.split()) > 1 else value
    return str(value)
