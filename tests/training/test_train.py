"""Whole runs on tiny models: a pattern is learnt, an interruption leaves no trace, the result converts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.engines import convert_pair
from tests.training.conftest import train_options
from trtllm_redrafter.errors import OutputError, UsageError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.settings.schema import EvaluateSection
from trtllm_redrafter.training.evaluation import EvaluateOptions, evaluate
from trtllm_redrafter.training.execute import train
from trtllm_redrafter.training.model import HeadKind
from trtllm_redrafter.training.plan import TrainOptions, plan_training


def evaluate_options(options: TrainOptions, **changes: Any) -> EvaluateOptions:
    prompts = options.settings.prompts
    assert prompts is not None
    settings = EvaluateSection(max_tokens=24, batch=7, max_text_tokens=120, batch_tokens=512, batch_rows=64)
    resolved: dict[str, Any] = {"grid": (DraftShape(1, 3), DraftShape(2, 2)), "dtype": "float32", "device": "cpu"}
    resolved |= {"base": options.base, "drafter": options.output, "prompts": prompts}
    resolved |= {name: changes.pop(name) for name in list(changes) if name in EvaluateOptions.__annotations__}
    return EvaluateOptions(settings=settings.model_copy(update=changes), **resolved)


@pytest.mark.parametrize("head", list(HeadKind))
def test_a_pattern_is_learnt_in_seconds(counting_base: Path, tmp_path: Path, head: HeadKind) -> None:
    options = train_options(counting_base, tmp_path, max_steps=400, learning_rate=1e-2, head=head.value, held_out=0.0)
    result = train(plan_training(options), no_progress)
    report = evaluate(evaluate_options(options, report=tmp_path / "report", min_acceptance=3.0), no_progress)
    line = report.acceptance[0]
    assert (line.acceptance_length - 1) / 3 >= 0.95 * (
        22 / 23
    ) and report.passes  # the last step of a text has less to accept
    assert report.accuracy[0]["top1"] >= 0.95
    assert json.loads((tmp_path / "report" / "report.json").read_text())["passes"] is True
    assert "| 1x3 |" in (tmp_path / "report" / "report.md").read_text()
    assert not evaluate(evaluate_options(options, min_acceptance=4.5), no_progress).passes
    assert result.metrics["steps"] == 400


def run_to(folder: Path, base: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    options = train_options(base, folder, **changes)
    train(plan_training(options), no_progress)
    log = [json.loads(line) for line in (folder / "work" / "metrics.jsonl").read_text().splitlines()]
    for line in log:
        del line["rows_per_second"]
    return load_file(options.output / "model.safetensors"), log


def test_an_interrupted_run_resumes_to_the_same_drafter(random_base: Path, tmp_path: Path) -> None:
    weights, log = run_to(tmp_path / "whole", random_base)

    def stop(stage: str, done: int, total: int | None, unit: str) -> None:
        if stage == "train" and done == 5:
            raise KeyboardInterrupt

    options = train_options(random_base, tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        train(plan_training(options), stop)
    assert not options.output.exists()
    resumed, resumed_log = run_to(tmp_path / "broken", random_base, resume=True)
    assert resumed_log == log
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_the_drafter_directory_converts(random_base: Path, tmp_path: Path) -> None:
    options = train_options(random_base, tmp_path)
    result = train(plan_training(options), no_progress)
    config = json.loads((options.output / "config.json").read_text())
    assert config["model_type"] == "recurrent_drafting_drafter" and config["draft_len"] == 3
    assert config["base_model"]["name"] == "base" and config["tie_lm_head"] is True
    assert load_file(options.output / "draft_vocab.safetensors")["token_ids"].dtype == torch.int32
    assert set(result.metrics["held_out"]) == {"rows", "accuracy", "acceptance"}
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "base").symlink_to(random_base)
    (tmp_path / "pair" / "drafter").symlink_to(options.output)
    checkpoint = convert_pair(tmp_path / "pair", num_beams=2, draft_len=3)
    with safe_open(checkpoint / "rank0.safetensors", framework="pt") as file:
        assert "drafter.lm_head.weight" in file.keys()  # noqa: SIM118


def test_cached_and_uncached_training_agree(random_base: Path, tmp_path: Path) -> None:
    first, log = run_to(tmp_path, random_base)
    options = train_options(random_base, tmp_path, overwrite=True)
    again = train(plan_training(options), no_progress)
    assert again.cache_made is None
    second = load_file(options.output / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(log) == 6


def test_the_plan_says_what_will_be_written(counting_base: Path, tmp_path: Path) -> None:
    options = train_options(counting_base, tmp_path, held_out=0.0)
    plan = plan_training(options)
    assert not (tmp_path / "work").exists() and not options.output.exists()
    result = train(plan, no_progress)
    weights = load_file(options.output / "model.safetensors")
    assert plan.parameters == sum(w.numel() for w in weights.values())
    used = sum(p.stat().st_size for p in (tmp_path / "work" / "cache").iterdir())
    assert abs(used - plan.cache.total_bytes) <= 0.05 * plan.cache.total_bytes  # no answer of this base ends early
    assert plan.cache.rows == result.metrics["rows"] == 24 * 24
    assert "at most 576 tokens to learn" in plan.render()


def test_epochs_become_steps(counting_base: Path, tmp_path: Path) -> None:
    plan = plan_training(train_options(counting_base, tmp_path, epochs=2.0, max_steps=None))
    assert plan.fit_for(576).max_steps == 2 * math.ceil(math.ceil((576 + 15) / 16) / 4)


def test_bad_options_are_refused_together(counting_base: Path, tmp_path: Path) -> None:
    weights = {"kd_weight": 0.0, "ce_weight": 0.0}
    parts = {"windows": 5, "accumulation": 2}
    bad = train_options(counting_base, tmp_path, data=tmp_path, dtype="int8", epochs=2.0, **weights, **parts)
    with pytest.raises(UsageError) as caught:
        plan_training(bad)
    assert [p.what for p in caught.value.problems] == [
        "kd_weight and ce_weight are both 0",
        "5 windows cannot be split in 2 equal parts",
        "epochs and max_steps are both given",
        "exactly one of data and prompts is needed",
        "dtype is 'int8'",
    ]


def test_an_existing_output_needs_overwrite(counting_base: Path, tmp_path: Path) -> None:
    options = train_options(counting_base, tmp_path)
    options.output.mkdir()
    (options.output / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        plan_training(options)
