"""Where recipe values are written: YAML files, presets in `configs/`, `key=value` pairs, command-line flags.

A file that cannot be read as a recipe ends here, with the line; what its keys mean is checked in `layers`.
`preset: NAME` in a file lays `configs/NAME.yaml` below it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trtllm_redrafter.errors import InputError, Problem, UsageError, raise_together
from trtllm_redrafter.paths import read_regular
from trtllm_redrafter.settings.layers import Layer, Origin, nest

PRESET_KEY = "preset"

MAX_RECIPE_BYTES = 2**20
MAX_NODES = 100_000
"""Nine lists of nine aliases each, nine deep, are a few lines of YAML and three billion values."""


class _Loader(yaml.SafeLoader):
    """YAML that refuses what PyYAML accepts: repeated keys (the last one wins) and aliases inside their own anchor."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: set[str] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        anchor = getattr(event, "anchor", None)
        if anchor is None:
            return super().compose_node(parent, index)
        if self.check_event(yaml.AliasEvent):
            if anchor in self._open:
                what = f"*{anchor} is used inside its own anchor"
                raise yaml.composer.ComposerError(None, None, what, event.start_mark)
            return super().compose_node(parent, index)
        self._open.add(anchor)
        node = super().compose_node(parent, index)
        self._open.discard(anchor)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            what = None
            if not isinstance(key_node, yaml.ScalarNode):
                what = "a key is a list or a mapping, it must be a word"
            elif key_node.value in seen:
                what = f"the key {key_node.value!r} appears twice"
            if what is not None:
                raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _load(text: str) -> Any:
    """The values of a YAML text whose aliases, written out, stay within `MAX_NODES`."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is not None and _written_out(node, {}) > MAX_NODES:
            what = f"with its aliases written out it has more than {MAX_NODES} values"
            raise yaml.composer.ComposerError(None, None, what, node.start_mark)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values below a node, every alias counted as what it stands for."""
    if id(node) not in known:
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = () if isinstance(node, yaml.ScalarNode) else parts
        known[id(node)] = 1 + sum(_written_out(part, known) for part in inner)
    return known[id(node)]


def file_layers(path: Path) -> list[Layer]:
    """The layers of a recipe file: its preset, if it names one, then itself."""
    values = _read(path)
    preset = values.pop(PRESET_KEY, None)
    layers = [Layer(Origin("file", str(path)), values)]
    if preset is not None:
        layers.insert(0, preset_layer(preset, asked_by=path))
    return layers


def preset_layer(name: Any, *, asked_by: Path | str) -> Layer:
    """`configs/NAME.yaml`, from the working directory or the one this package came with."""
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or name.startswith("."):
        raise UsageError(f"preset {name!r} is not a name", where=asked_by, remedy=_preset_choice())
    found = _presets().get(name)
    if found is None:
        raise UsageError(f"there is no preset {name!r}", where=asked_by, remedy=_preset_choice())
    values = _read(found)
    if PRESET_KEY in values:
        raise InputError("a preset cannot build on another preset", where=found, remedy=f"remove its {PRESET_KEY!r}")
    return Layer(Origin("preset", name), values)


def _presets() -> dict[str, Path]:
    package = Path(__file__).resolve().parent.parent
    places = [package.parent / "configs", package / "configs", Path("configs")]
    return {path.stem: path for place in places if place.is_dir() for path in sorted(place.glob("*.yaml"))}


def _preset_choice() -> str:
    names = ", ".join(sorted(_presets()))
    return f"use one of: {names}" if names else "no presets are installed beside the package; copy configs/ here"


def _read(path: Path) -> dict[str, Any]:
    """A YAML mapping with string keys, or `InputError` with the line."""
    try:
        text = read_regular(path, MAX_RECIPE_BYTES).decode("utf-8-sig")
    except (InputError, UnicodeDecodeError) as e:
        why = (e.problem.why or e.problem.what) if isinstance(e, InputError) else str(e)
        raise InputError("cannot read the recipe", where=path, why=why, remedy="check the path") from e
    try:
        values = _load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        mark = getattr(e, "problem_mark", None)
        where = path if mark is None else f"{path}, line {mark.line + 1}, column {mark.column + 1}"
        why = getattr(e, "problem", None) or str(e)
        raise InputError("the recipe is not valid YAML", where=where, why=why, remedy="correct that line") from e
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        remedy = "write `key: value` lines, as in configs/smollm2-demo.yaml"
        raise InputError("the recipe is not a mapping of keys to values", where=path, remedy=remedy)
    return values


def set_layer(pairs: Sequence[str]) -> Layer:
    """`--set convert.num_beams=4`: values are YAML, so that numbers, lists and null can be given."""
    problems, values = [], {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(f"{pair!r} is not key=value", "--set", remedy="write --set convert.num_beams=4"))
            continue
        try:
            values[key.strip()] = _load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as e:
            why = getattr(e, "problem", None) or str(e)
            problems.append(Problem(f"the value of {key!r} is not YAML", "--set", why, "put it into quotes"))
    raise_together(UsageError, problems, "cannot read --set")
    return Layer(Origin("flag", "--set"), nest(values))


def template_arguments(pairs: Sequence[str] | None, flag: str) -> dict[str, Any] | None:
    """`enable_thinking=false` pairs as an object; None without any. Values are JSON, or words as YAML reads them."""
    problems, values = [], {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(f"{pair!r} is not KEY=JSON", flag, remedy=f"write {flag} enable_thinking=false"))
            continue
        try:
            values[key.strip()] = _json_or_word(text)
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            why = getattr(e, "problem", None) or str(e)
            problems.append(Problem(f"the value of {key!r} is not JSON", flag, why, "put a text into double quotes"))
    raise_together(UsageError, problems, f"cannot read {flag}")
    return values or None


def _json_or_word(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        value = yaml.load(text, Loader=_Loader)
        return value if value is None or isinstance(value, (bool, int, float, str, list, dict)) else text  # no dates


def flag_layers(flags: Mapping[str, tuple[str, Any]]) -> list[Layer]:
    """Flags as {dotted key: (flag, value)}; None means the flag was not given."""
    return [
        Layer(Origin("flag", flag), nest({key: value})) for key, (flag, value) in flags.items() if value is not None
    ]
