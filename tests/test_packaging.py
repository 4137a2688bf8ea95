"""pyproject.toml held against what is in the repository: the license, the extras, the Python versions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib", reason="it comes with Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imported() -> set[str]:
    """Top-level names of every module that the package imports, anywhere in it."""
    found: set[str] = set()
    for path in (ROOT / "trtllm_redrafter").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def test_the_license_is_the_one_that_is_named() -> None:
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    for heading in ("Apache License", "Version 2.0, January 2004", "9. Accepting Warranty or Additional Liability"):
        assert heading in text


def test_every_extra_is_of_use() -> None:
    for name, requirements in PROJECT["optional-dependencies"].items():
        if name == "dev":
            continue
        packages = {re.split(r"[^A-Za-z0-9_]", requirement)[0] for requirement in requirements}
        assert packages <= imported(), f"nothing imports what the extra {name!r} installs"


def test_python_versions_agree() -> None:
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) <= named
    assert f">={min(named, key=lambda v: int(v.partition('.')[2]))}" == PROJECT["requires-python"]


BACKENDS = "trtllm_redrafter/backends/"
FOLDERS = (
    "",
    "trtllm_redrafter/",
    f"{BACKENDS}tensorrt/",
    f"{BACKENDS}tensorrt_llm/",
    f"{BACKENDS}torch/native/",
    f"{BACKENDS}torch/cuda/",
    f"{BACKENDS}torch/native/kernels/",
)
THEIRS = ("commands/build.py", "builder.py", "plugin/plugin.py", "models/redrafter/", "llmapi/")
"""Files of TensorRT-LLM."""


def test_what_contributors_are_pointed_to_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`([\w./-]+(?:\.(?:py|md|h|cpp|cuh|yml|json|txt|sh)|/))`", text)
    ours = [path for path in paths if path not in THEIRS and "NAME" not in path]
    assert len(ours) > 40
    assert not [path for path in ours if not any((ROOT / folder / path).exists() for folder in FOLDERS)]


def anchors(path: Path) -> set[str]:
    """Of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target
