"""Acceptance measured along recorded texts is what the torch backend reports when it really decodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.engines import build_engine, convert_pair, load
from tests.tiny_models import write_drafter
from tests.training.conftest import VOCAB, train_options
from tests.training.test_train import evaluate_options
from trtllm_redrafter.backends.base import Request, Result, SamplingParams
from trtllm_redrafter.backends.requests import SpecDecodingStats
from trtllm_redrafter.errors import MismatchError, UsageError
from trtllm_redrafter.fsio import sha256_file
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.training.acceptance import accepted_per_step, summarize
from trtllm_redrafter.training.answers import RunnerWriter, WritingOptions
from trtllm_redrafter.training.data import read_prompts
from trtllm_redrafter.training.evaluation import evaluate
from trtllm_redrafter.training.execute import train
from trtllm_redrafter.training.frozen_base import load_tokenizer
from trtllm_redrafter.training.plan import TrainOptions, plan_training
from trtllm_redrafter.training.rows import TrainingRows

GRID = (DraftShape(1, 1), DraftShape(1, 3), DraftShape(3, 2), DraftShape(3, 3), DraftShape(6, 3))


def test_the_next_step_begins_behind_what_was_accepted() -> None:
    # Seven tokens: the first comes from the prompt; steps emit 3, 1, 2 of the other six.
    assert accepted_per_step([2, 9, 9, 0, 1, 9, 0]) == [2, 0, 1]


def test_a_step_does_not_count_beyond_the_text() -> None:
    assert accepted_per_step([3, 0, 0, 0]) == [2]  # three tokens are left: two drafts and the base model's own
    assert accepted_per_step([1, 0]) == [0]
    assert accepted_per_step([5]) == []


def test_the_interval_comes_from_the_spread_between_texts() -> None:
    rows = TrainingRows(torch.zeros(9, 1), torch.zeros(9, dtype=torch.int32), torch.tensor([0] * 5 + [1] * 4))
    accepted = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 0])
    found = summarize(accepted, rows, DraftShape(1, 1), ["a", "b"])
    # Text a: 2 steps emit 4; text b: 3 steps emit 3.
    assert found.acceptance_length == pytest.approx(7 / 5) and found.steps == 5
    assert found.per_category == {"a": 2.0, "b": 1.0}
    assert found.acceptance_rate_per_position == [pytest.approx(2 / 5)]
    half = 1.96 * ((4 - 1.4 * 2) ** 2 * 2 + (3 - 1.4 * 3) ** 2 * 2) ** 0.5 / 5
    assert found.high - found.acceptance_length == pytest.approx(half)


@pytest.fixture(scope="module", params=[0, 64], ids=["whole head", "draft vocabulary"])
def trained(
    random_base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> TrainOptions:
    """A drafter that is right now and then, with and without a draft vocabulary for the engine's fast head."""
    folder = tmp_path_factory.mktemp("trained")
    options = train_options(random_base, folder, max_steps=60, held_out=0.0, draft_vocab=request.param)
    train(plan_training(options), no_progress)
    return options


def decode(options: TrainOptions, shape: DraftShape, folder: Path) -> list[Result]:
    folder.mkdir()
    (folder / "base").symlink_to(options.base)
    (folder / "drafter").symlink_to(options.output)
    checkpoint = convert_pair(folder, num_beams=shape.num_beams, draft_len=shape.draft_len)
    runner = load(build_engine(checkpoint, folder / "engine", options.base), shape)
    assert options.settings.prompts is not None
    prompts = read_prompts(options.settings.prompts, load_tokenizer(options.base), max_tokens=100)
    sampling = SamplingParams(max_tokens=options.writing.max_tokens)
    return runner.generate([Request(p.token_ids, sampling) for p in prompts])


def totals(results: Sequence[Result]) -> SpecDecodingStats:
    found = SpecDecodingStats()
    for result in results:
        found.add(result)
    return found


def test_it_agrees_with_real_decoding(trained: TrainOptions, tmp_path: Path) -> None:
    report = evaluate(evaluate_options(trained, grid=GRID, draft_vocab=True), no_progress)
    assert report.as_dict()["drafter_sha256"] == sha256_file(trained.output / "model.safetensors")
    seen = set()
    for shape, found in zip(GRID, report.acceptance, strict=True):
        decoded = totals(decode(trained, shape, tmp_path / f"{shape}"))
        assert found.steps == decoded.steps
        assert found.acceptance_length == pytest.approx(decoded.acceptance_length, abs=1e-12)
        assert found.acceptance_rate_per_position == pytest.approx(decoded.acceptance_rate_per_position, abs=1e-12)
        seen.add(decoded.accepted_tokens)
    assert min(seen) > 20 and len(seen) > 2  # the drafter is neither hopeless nor perfect


def test_sharing_a_search_changes_nothing(trained: TrainOptions) -> None:
    together = evaluate(evaluate_options(trained, grid=GRID), no_progress).acceptance
    alone = [evaluate(evaluate_options(trained, grid=(s,)), no_progress).acceptance[0] for s in GRID]
    assert together == alone


@pytest.mark.parametrize("layout", ["apple", "lm_heads", "sequential", "ours"])
def test_drafters_of_other_trainers_are_read(trained: TrainOptions, tmp_path: Path, layout: str) -> None:
    """The same random drafter in every layout, `.pt` included, gives the same figures."""
    found = []
    for name, file in (("reference", "model.safetensors"), (layout, "model.pt")):
        folder = tmp_path / name
        write_drafter(folder, layout="apple" if name == "reference" else layout, vocab_size=VOCAB, file=file)
        options = evaluate_options(trained, drafter=folder, grid=(DraftShape(2, 3),))
        found.append(evaluate(options, no_progress).acceptance)
    assert found[0] == found[1]


def test_a_drafter_for_another_base_is_refused(trained: TrainOptions, tmp_path: Path) -> None:
    write_drafter(tmp_path / "other", vocab_size=96, hidden_size=16, exit_dim=32)
    with pytest.raises(UsageError) as caught:
        evaluate(evaluate_options(trained, drafter=tmp_path / "other"), no_progress)
    assert [p.what for p in caught.value.problems] == [
        "hidden_size is 16 in the drafter and 32 in the base model",
        "vocab_size is 96 in the drafter and 259 in the base model",
    ]


def test_refusals_come_before_the_model_is_loaded(trained: TrainOptions, counting_base: Path) -> None:
    with pytest.raises(UsageError, match="2x4 drafts further than the 3 tokens"):
        evaluate(evaluate_options(trained, grid=(DraftShape(2, 4),)), no_progress)
    with pytest.raises(UsageError, match="answers of 1 tokens") as caught:
        evaluate(evaluate_options(trained, max_tokens=1, grid=(DraftShape(60, 2),)), no_progress)
    assert "num_beams is 60" in str(caught.value)


def test_an_engine_decodes_the_prompts_and_nothing_of_it_is_left(
    trained: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    class Watched(RunnerWriter):
        def write(self, prompts: Sequence[Sequence[int]], options: WritingOptions, first: int) -> list[list[int]]:
            used.append(len(prompts))
            return super().write(prompts, options, first)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("trtllm_redrafter.training.answers.RunnerWriter", Watched)
    options = evaluate_options(trained)
    found = evaluate(options, no_progress, engine=True)
    assert sum(used) == found.texts and found.as_dict() == evaluate(options, no_progress).as_dict()
    assert not list(tmp_path.iterdir())


def test_where_no_engine_can_be_made_transformers_decodes(
    trained: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MismatchError("this model cannot be converted")

    options = evaluate_options(trained)
    plain = evaluate(options, no_progress).as_dict()
    monkeypatch.setattr("trtllm_redrafter.training.evaluation.engine_writer", refuse)
    assert evaluate(options, no_progress, engine=True).as_dict() == plain
