"""`bench` and `bench compare` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.tiny import Program


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"Word {i}", "category": "a" if i < 2 else "b"} for i in range(4)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def test_bench_and_compare(program: Program, artefacts: Path, prompts: Path, tmp_path: Path) -> None:
    flags = ["--prompts", prompts, "--batch", "1,2", "--max-tokens", 4]
    report = tmp_path / "report"
    assert program("bench", artefacts / "engine", *flags, "--report", report, "--json") == 0
    document = program.document
    assert document["complete"] and [b["batch"] for b in document["summary"]] == [1, 2]
    assert document["summary"][0]["identical_output"] == {
        "compared": 4, "ties": 0, "faults": 0, "unexamined": 0, "same": 4
    }  # fmt: skip
    assert document["settings"]["repeats"] == 3 and "batch 1: " in program.out
    assert (report / "report.html").exists() and (report / "report.md").exists()

    assert program("bench", "compare", report, report / "result.json", "--json") == 0
    assert program.document["regressions"] == 0 and "no regression" in program.out
    slower = json.loads((report / "result.json").read_text())
    for batch in slower["batches"]:
        for record in batch["drafting"]["records"]:
            record["seconds"] *= 3
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    assert program("bench", "compare", report, tmp_path / "slower.json") == 8 and "REGRESSION" in program.out

    assert program("bench", artefacts / "engine", *flags, "--report", report) == 5 and "exists already" in program.err


def test_baseline_engine_and_recipe(program: Program, artefacts: Path, prompts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"engine: {artefacts / 'engine'}\nbench:\n  max_tokens: 3\n  batch: '1'\n")
    assert program("bench", recipe, "--prompts", prompts, "--baseline", artefacts / "plain", "--json") == 0
    assert program.document["settings"]["baseline"].endswith("plain")
    assert program.document["summary"][0]["identical_output"]["same"] == 4


def test_spec_bench_protocol(program: Program, artefacts: Path, tmp_path: Path) -> None:
    questions = tmp_path / "question.jsonl"
    questions.write_text('{"question_id": 81, "category": "writing", "turns": ["Hi", "More"]}\n')
    flags = ["--spec-bench", questions, "--max-tokens", 4, "--json"]
    assert program("bench", artefacts / "engine", *flags) == 0
    document = program.document
    assert document["settings"]["requests"] == 2 and len(document["summary"]) == 1
    assert document["summary"][0]["spec_bench"]["speedup"] > 0 and "Spec-Bench" in program.out


def test_refusals(program: Program, artefacts: Path, prompts: Path, tmp_path: Path) -> None:
    assert program("bench", artefacts / "plain", "--prompts", prompts) == 2 and "no drafter" in program.err
    assert program("bench", tmp_path / "absent") == 3 and "there is no engine" in program.err
    assert program("bench", artefacts / "engine", "--batch", "1,x") == 2 and "batch sizes" in program.err
    assert program("bench", artefacts / "engine", "--repeats", 1) == 2 and "bench.repeats" in program.err
    assert program("bench", artefacts / "engine", "--prompts", prompts, "--batch", 9) == 2
    assert program("bench", artefacts / "engine", artefacts / "plain") == 2 and "--baseline" in program.err
    assert program("bench", "compare", prompts, prompts) == 3


def test_an_interrupted_run_keeps_what_it_measured(
    program: Program, artefacts: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtllm_redrafter.benchmark.measure import Session

    keep, calls = Session._keep, []

    def interrupted(self: Session, *arguments: object) -> None:
        keep(self, *arguments)  # type: ignore[arg-type]
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_keep", interrupted)
    flags = ["--prompts", prompts, "--batch", "1", "--max-tokens", 4, "--report", tmp_path / "report", "--json"]
    assert program("bench", artefacts / "engine", *flags) == 130
    assert program.document["error"]["kind"] == "interrupted" and "was interrupted" in program.out
    measured = json.loads(program.out.splitlines()[-2])  # the line before says what was measured
    assert not measured["complete"] and measured["summary"][0]["drafting"]["requests"] == 3
    kept = json.loads((tmp_path / "report" / "result.json").read_text())
    assert len(kept["batches"][0]["drafting"]["records"]) == 3


def test_answers_of_one_token_have_no_latencies(
    program: Program, artefacts: Path, prompts: Path, tmp_path: Path
) -> None:
    """Nothing is decoded: no step, no gap, no ratio, and still a report."""
    flags = ["--prompts", prompts, "--batch", "1", "--max-tokens", 1, "--report", tmp_path / "report", "--json"]
    assert program("bench", artefacts / "engine", *flags) == 0, program.err
    [found] = program.document["summary"]
    assert found["step_time_ratio"] is None and found["drafting"]["gap_seconds"]["p50"] is None
    assert found["decode_speedup"]["value"] is None and found["speedup"]["value"] > 0
    assert "NaN" not in (tmp_path / "report" / "result.json").read_text()
    assert "nan" not in (tmp_path / "report" / "report.html").read_text().lower().replace("nano", "")


def test_a_report_that_cannot_be_written_leaves_the_figures(
    program: Program, artefacts: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtllm_redrafter.benchmark import report
    from trtllm_redrafter.errors import OutputError

    def full(*arguments: object, **options: object) -> None:
        raise OutputError("no space left")

    monkeypatch.setattr(report, "write_report", full)
    flags = ["--prompts", prompts, "--batch", "1", "--max-tokens", 4, "--report", tmp_path / "report"]
    assert program("bench", artefacts / "engine", *flags) == 5
    assert "batch 1: " in program.out and "no space left" in program.err
