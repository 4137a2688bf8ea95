"""`tune` from the command line, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.cli.tiny import Program


@pytest.fixture
def recipe(models: Path, artefacts: Path, tmp_path: Path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"Word {i}", "category": "ab"[i % 2]}) for i in range(3)))
    file = tmp_path / "mine.yaml"
    values = {
        "base": str(models / "base"), "drafter": str(models / "drafter"), "engine": str(artefacts / "engine"),
        "tune": {"prompts": str(prompts), "max_tokens": 8, "steps": 4, "batch": "1,2"},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(values))
    return file


def test_tune_predicts_and_measures(program: Program, recipe: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    flags = ["--grid", "1x2,2x3", "--budget", 1, "--report", report, "--json"]
    assert program("tune", recipe, *flags) == 0, program.err
    document = program.document
    assert {(p["setting"], p["batch"]) for p in document["predictions"]} == {
        ("1x2", 1), ("1x2", 2), ("2x3", 1), ("2x3", 2)
    }  # fmt: skip
    assert [c["batch"] for c in document["checks"]] == [1, 2]
    for check in document["checks"]:  # the walk along recorded texts is what decoding does, exactly
        assert check["measured_acceptance_length"] == pytest.approx(check["predicted_acceptance_length"], abs=1e-6)
    assert {f.name for f in report.iterdir()} == {"tune.html", "tune.md", "tune.json", "recipe.yaml", "manifest.json"}
    written = yaml.safe_load((report / "recipe.yaml").read_text())
    assert written["base"] == yaml.safe_load(recipe.read_text())["base"]
    assert program("tune", recipe, *flags) == 5


def test_tune_for_a_gpu_that_is_not_here(program: Program, recipe: Path, tmp_path: Path) -> None:
    flags = ["--target", "h100-80gb", "--grid", "1x2,2x3", "--set", f"engine={tmp_path / 'absent'}", "--json"]
    assert program("tune", recipe, *flags) == 0, program.err
    document = program.document
    assert document["target"] == "h100-80gb" and document["written_by"] == "transformers"
    assert len(document["predictions"]) == 4 and not document["checks"]


def test_refusals(program: Program, recipe: Path, tmp_path: Path) -> None:
    absent = ["--set", f"engine={tmp_path / 'absent'}"]
    assert program("tune", recipe, *absent) == 2 and "run `pipeline`" in program.err
    assert program("tune", recipe, "--target", "h100-80gb", "--budget", 2) == 2 and "--budget" in program.err
    assert program("tune", recipe, "--target", "h200x") == 2 and "did you mean" in program.err
    assert program("tune", recipe, "--grid", "2by3") == 2 and "tune.grid" in program.err
    assert program("tune", recipe, "--batch", "1,64") == 2 and "batch 64" in program.err
    empty = tmp_path / "empty.yaml"
    empty.write_text("backend: torch\n")
    assert program("tune", empty) == 2 and "base" in program.err and "drafter" in program.err


def test_texts_of_one_token_cannot_be_tuned_for(program: Program, recipe: Path, tmp_path: Path) -> None:
    """A base model that ends every text at once would divide by nothing."""
    target = ["--target", "h100-80gb", "--set", f"engine={tmp_path / 'absent'}"]
    assert program("tune", recipe, *target, "--max-tokens", 1) == 2 and "nothing to draft" in program.err
    assert program("tune", recipe, "--max-tokens", 1) == 2 and "nothing to draft" in program.err


def test_what_a_gpu_cannot_hold_is_left_out(program: Program, recipe: Path, tmp_path: Path) -> None:
    """A tiny model keeps a few hundred bytes a token; some millions of requests are still too many for 80 GB."""
    flags = ["--target", "h100-80gb", "--grid", "1x2", "--set", f"engine={tmp_path / 'absent'}", "--json"]
    assert program("tune", recipe, *flags, "--batch", "1,9000000", "--report", tmp_path / "report") == 0, program.err
    document = program.document
    assert [p["batch"] for p in document["predictions"]] == [1]
    [left_out] = document["left_out"]
    assert left_out["batch"] == 9000000 and left_out["why"] and "1 setting(s) are left out" in program.out
    [limit] = document["engine_limits"]
    assert limit["max_num_tokens"] > 0
    text = (tmp_path / "report" / "recipe.yaml").read_text()
    assert f"max_num_tokens is {limit['max_num_tokens']}" in text
    assert program("tune", recipe, *flags, "--batch", "9000000") == 4 and "no setting fits" in program.err


def test_an_interrupted_budget_keeps_the_predictions(
    program: Program, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtllm_redrafter.benchmark.measure import Session

    run, calls = Session.run, []

    def interrupted(self: Session, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "run", interrupted)
    report = tmp_path / "report"
    flags = ["--grid", "1x2,2x3", "--budget", 1, "--report", report, "--json"]
    assert program("tune", recipe, *flags) == 130 and "were interrupted" in program.out
    kept = json.loads((report / "tune.json").read_text())
    assert len(kept["predictions"]) == 4 and [c["batch"] for c in kept["checks"]] == [1] and not kept["complete"]
