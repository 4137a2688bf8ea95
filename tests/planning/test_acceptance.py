"""An acceptance length out of a report of `evaluate`: the right row is taken, anything doubtful is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tiny import Program
from tests.tiny_models import write_drafter_config
from tests.training.conftest import train_options
from tests.training.test_train import evaluate_options
from trtllm_redrafter.checkpoint.manifest import Manifest, record_tree
from trtllm_redrafter.errors import InputError, MismatchError
from trtllm_redrafter.fsio import sha256_file
from trtllm_redrafter.planning.acceptance import read_acceptance
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.training.acceptance import Acceptance
from trtllm_redrafter.training.evaluation import EvaluationReport

CONFIGS = Path(__file__).parent.parent.parent / "configs"
LLAMA = {"base": "Llama-3.1-8B-Instruct", "drafter": "redrafter-llama-3.1-8b"}


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)
    return Program(capsys)


def measured(beams: int, length: int, mean: float) -> Acceptance:
    return Acceptance(DraftShape(beams, length), mean, mean - 0.1, mean + 0.1, mean, 400, [0.5] * length, {})


def report(path: Path, **changes: Any) -> Path:
    """What `evaluate` writes, from its own class, with the names of a recipe."""
    options = evaluate_options(train_options(path.parent / "base", path.parent))
    made = EvaluationReport(options, 80, 9211, [measured(2, 3, 2.25), measured(5, 5, 2.875)], [], 128256)
    path.write_text(json.dumps(made.as_dict() | LLAMA | changes))
    return path


def test_the_row_of_the_planned_shape_is_taken(tmp_path: Path) -> None:
    path = report(tmp_path / "report.json")
    found = read_acceptance(path, DraftShape(2, 3))
    assert (found.acceptance_length, found.low, found.high) == (2.25, 2.15, 2.35)
    assert found.render() == (
        f"acceptance: 2.25 tokens per step, the 2x3 row of {path}: 80 prompts and 9211 tokens, "
        "95 % interval 2.15 to 2.35"
    )
    assert read_acceptance(tmp_path, DraftShape(5, 5)).acceptance_length == 2.875  # the folder `--report` wrote


def test_the_last_line_of_what_evaluate_prints_will_do(tmp_path: Path) -> None:
    path = report(tmp_path / "out.txt")
    path.write_text(f"| beams | acceptance length |\n\n{path.read_text()}\n")
    assert read_acceptance(path, DraftShape(5, 5)).acceptance_length == 2.875


def test_a_report_without_interval_and_names_will_do(tmp_path: Path) -> None:
    path = tmp_path / "short.json"
    path.write_text('{"acceptance": [{"setting": "2x3", "acceptance_length": 2}]}')
    assert read_acceptance(path, DraftShape(2, 3)).render().endswith(f"the 2x3 row of {path}")


def test_reports_of_earlier_versions_are_read() -> None:
    """They call the acceptance length `walk`; the shipped drafter's report is one."""
    path = Path(__file__).parents[2] / "drafters/smollm2-135m-instruct/evaluation_cpu.json"
    [row] = [row for row in json.loads(path.read_text())["acceptance"] if row["setting"] == "2x3"]
    found = read_acceptance(path, DraftShape(2, 3))
    assert (found.acceptance_length, [found.low, found.high]) == (row["walk"], row["walk_95"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("", "neither the file nor its last line is a JSON object"),
        ("[1]", "neither the file nor its last line is a JSON object"),
        ("\x00\xff", "neither the file"),
        ('{"command": "evaluate", "ok": false, "error": {}}', "it has no list `acceptance`"),
        ('{"acceptance": []}', "it has no list `acceptance`"),
        ('{"acceptance": [{"setting": "5x5"}]}', "lacks `setting` or `acceptance_length`"),
        ('{"acceptance": [{"setting": "5x5", "acceptance_length": true}]}', "lacks `setting` or `acceptance_length`"),
        ('{"acceptance": [{"setting": "5x5", "acceptance_length": NaN}]}', "lacks `setting` or `acceptance_length`"),
        ('{"acceptance": [{"setting": "5x5", "acceptance_length": 6.5}]}', "a step of 5x5 emits 1 to 6 tokens"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        read_acceptance(path, DraftShape(5, 5))
    assert "or the number itself" in str(caught.value)


def test_a_shape_that_was_not_measured_is_refused_with_those_that_were(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="no row for 4x4") as caught:
        read_acceptance(report(tmp_path / "report.json"), DraftShape(4, 4))
    assert "it has 2x3, 5x5" in str(caught.value) and "evaluate --grid 4x4" in str(caught.value)


def test_plan_takes_a_report(program: Program, tmp_path: Path) -> None:
    report(tmp_path / "report.json")
    flags = ["plan", CONFIGS / "llama-3.1-8b.yaml", "--set", "plan.acceptance_length=report.json", "--json"]
    assert program(*flags) == 0, program.err
    assert "2.88 tokens per step, the 5x5 row of report.json: 80 prompts" in program.out
    assert "speed-up at 2.88" in program.out
    assert program.document["latency"]["acceptance_length"] == 2.875
    assert program.document["acceptance"]["path"] == "report.json" and program.document["acceptance"]["prompts"] == 80
    smaller = ["--set", "convert.num_beams=2", "--set", "convert.draft_len=3"]
    assert program(*flags, *smaller) == 0 and program.document["latency"]["acceptance_length"] == 2.25
    assert program(*flags, "--set", "drafter=null") == 0 and program.document["acceptance"] is None


def test_plan_takes_a_report_from_the_recipe(program: Program, tmp_path: Path) -> None:
    report(tmp_path / "report.json")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((CONFIGS / "llama-3.1-8b.yaml").read_text() + "\nplan: {acceptance_length: report.json}\n")
    assert program("plan", recipe) == 0 and "speed-up at 2.88" in program.out
    recipe.write_text(recipe.read_text().replace("report.json", "2.5"))
    assert program("plan", recipe) == 0 and "speed-up at 2.50" in program.out and "row of" not in program.out


def test_plan_refuses_a_report_of_another_model(program: Program, tmp_path: Path) -> None:
    flags = ["plan", CONFIGS / "llama-3.1-8b.yaml", "--set", "plan.acceptance_length=report.json"]
    report(tmp_path / "report.json", base="Qwen3-8B")
    assert program(*flags) == 4 and "the report's base is Qwen3-8B, the recipe's is Llama-3.1-8B" in program.err
    report(tmp_path / "report.json", base="Qwen3-8B", drafter="other")
    assert program(*flags) == 4 and "the report's drafter is other" in program.err and "Qwen3-8B" in program.err


def test_plan_knows_a_drafter_by_its_weights(program: Program, tmp_path: Path) -> None:
    drafter = tmp_path / "renamed"
    drafter.mkdir()
    write_drafter_config(drafter, hidden_size=4096, exit_dim=64, num_draft_layers=2, rnn=True, vocab_size=128256)
    (drafter / "model.safetensors").write_bytes(b"what a plan does not read")
    Manifest("drafter", {}, {}, {}, record_tree(drafter)).write(drafter)
    measured_hash = sha256_file(drafter / "model.safetensors")
    flags = ["plan", CONFIGS / "llama-3.1-8b.yaml", "--set", "plan.acceptance_length=report.json", "--set",
             f"drafter={drafter}"]  # fmt: skip
    report(tmp_path / "report.json", drafter_sha256=measured_hash)
    assert program(*flags) == 0, program.err
    report(tmp_path / "report.json", drafter="renamed", drafter_sha256="0" * 64)
    assert program(*flags) == 4 and "the drafter has changed since it was evaluated" in program.err


def test_plan_says_how_the_measurement_differs(program: Program, tmp_path: Path) -> None:
    flags = ["--set", "plan.acceptance_length=report.json"]
    report(tmp_path / "report.json", drafted_from_tokens=16384)
    assert program("plan", CONFIGS / "llama-3.1-8b.yaml", *flags) == 0
    assert "drafting from 16384 of 128256 tokens; TensorRT-LLM drafts from all" in program.out
    report(tmp_path / "report.json", base="Qwen2.5-7B-Instruct", drafter="redrafter-qwen2.5-7b")
    assert program("plan", CONFIGS / "qwen2.5-7b-fp8.yaml", *flags) == 0, program.err
    assert "measured on Qwen2.5-7B-Instruct, before quantization" in program.out


@pytest.mark.parametrize("value", ["0.5", "true", "[2]", "''", ".inf", ".nan", "1" + "0" * 400])
def test_anything_else_is_refused(program: Program, value: str) -> None:
    assert program("plan", CONFIGS / "llama-3.1-8b.yaml", "--set", f"plan.acceptance_length={value}") == 2
    assert "tokens per step, at least 1, or the path of a report of `evaluate`" in program.err
