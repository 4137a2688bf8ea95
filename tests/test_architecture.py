"""Imports go down one list of packages, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "trtllm_redrafter"
LAYERS = (
    "cli", "run", "benchmark", "training", "verify", "doctor", "settings", "backends", "planning", "conversion",
    "base_models", "checkpoint", "prompts", "redrafter", "locks", "fsio", "paths", "memory", "scratch", "progress",
    "errors", "version",
)  # fmt: skip
"""Top to bottom, as in docs/architecture.md; a package imports from itself and from those below it."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for file in Path(PACKAGE).rglob("*.py"):
        found[".".join(file.with_suffix("").parts).removesuffix(".__init__")] = file
    return found


def imports(name: str) -> Iterator[str]:
    """Modules of ours that a module imports, anywhere in it: at the top, in functions, for annotations."""
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules() else node.module


@cache
def graph() -> dict[str, set[str]]:
    return {name: set(imports(name)) - {name} for name in modules()}


def layer(module: str) -> str | None:
    """The front door (`__init__`, `__main__`) belongs to no layer."""
    parts = module.split(".")
    return None if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def test_every_package_is_in_the_list() -> None:
    assert {layer(name) for name in modules()} - {None} == set(LAYERS)
    text = Path("docs/architecture.md").read_text()
    assert all(f"`{name}" in text for name in LAYERS), "docs/architecture.md names every package"


def test_imports_go_down() -> None:
    wrong = []
    for name, found in graph().items():
        for other in found:
            here, there = layer(name), layer(other)
            if here and there and LAYERS.index(there) < LAYERS.index(here):
                wrong.append(f"{name} imports {other}")
            if here and not there:
                wrong.append(f"{name} imports the front door, {other}")
    assert not wrong


def test_there_are_no_circles() -> None:
    """Modules whose imports have all been taken away go, until none can: what is left goes in circles."""
    left = {name: {other for other in found if other in graph()} for name, found in graph().items()}
    while done := {name for name, found in left.items() if not found}:
        left = {name: found - done for name, found in left.items() if name not in done}
    assert not left


def test_one_backend_never_imports_the_other() -> None:
    pairs = (("backends.torch", "backends.tensorrt_llm"), ("backends.tensorrt_llm", "backends.torch"))
    for mine, others in pairs:
        for name, found in graph().items():
            if name.startswith(f"{PACKAGE}.{mine}"):
                assert not [other for other in found if other.startswith(f"{PACKAGE}.{others}")], name


def test_only_the_command_line_prints() -> None:
    for name, file in modules().items():
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        prints = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not prints or layer(name) == "cli" or name.endswith(("worker", "llmapi_launch")), name


def defined(file: str) -> set[str]:
    """Names of a module's classes and top-level assignments."""
    nodes = ast.parse((Path(PACKAGE) / file).read_text()).body
    targets = [node.targets for node in nodes if isinstance(node, ast.Assign)]
    names = {target.id for group in targets for target in group if isinstance(target, ast.Name)}
    return names | {node.name for node in nodes if isinstance(node, ast.ClassDef)}


def test_the_document_names_what_exists() -> None:
    """Every file is there; every type in a table, or with a file in brackets behind it, is defined in that file."""
    text = Path("docs/architecture.md").read_text()
    files = {file for file in re.findall(r"`([\w/]+\.py)`", text) if not file.startswith("tests/")}
    assert files and all((Path(PACKAGE) / file).is_file() for file in files), files
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `([\w/]+\.py)` \|", text, re.MULTILINE)
    rows += re.findall(r"(`[A-Z]\w+`)\s+\(`([\w/]+\.py)`\)", text)
    assert len(rows) > 20
    for types, file in rows:
        assert set(re.findall(r"\w+", types)) <= defined(file), (types, file)


def test_modules_in_the_list_of_packages_exist() -> None:
    text = Path("docs/architecture.md").read_text()
    for package, owned in re.findall(r"^\| `(\w+)/` \| (.+) \|$", text, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", owned):
            assert f"{PACKAGE}.{package}.{name}" in modules(), (package, name)


def test_a_class_name_is_one_class() -> None:
    """In the whole package, so that a name in a message, a document or a search says which one is meant."""
    found: dict[str, list[str]] = {}
    for name, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    assert not {name: places for name, places in found.items() if len(places) > 1}


def test_no_file_is_too_long_to_read() -> None:
    sources = [file for file in Path(PACKAGE).rglob("*") if file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp")]
    lengths = {str(file): len(file.read_text().splitlines()) for file in sources}
    assert len(lengths) > 200
    assert not {file: length for file, length in lengths.items() if length > 400}
