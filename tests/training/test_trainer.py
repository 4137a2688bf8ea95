"""The loop: exact resume, a restricted loss that agrees with a plain one, and a schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.conftest import fit_options
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DrafterConfig
from trtllm_redrafter.training.model import DrafterSpec, HeadKind, InputScales, TrainableDrafter
from trtllm_redrafter.training.rows import TrainingRows
from trtllm_redrafter.training.trainer import BaseTensors, FitOptions, StepLog, Trainer

H, V = 8, 30


def make(options: FitOptions, *, loss_vocab: int = V) -> Trainer:
    torch.manual_seed(2)
    lengths = [40, 25, 60, 10]
    texts = [(torch.randn(n, H), torch.randint(V, (n,))) for n in lengths]
    rows = TrainingRows.join(texts)
    head = torch.randn(V, H)
    base = BaseTensors(torch.randn(V, H), head, torch.randperm(V)[:loss_vocab])
    scales = InputScales.measure(rows.hidden, base.embedding)
    spec = DrafterSpec(DrafterConfig(V, H, 2 * H, 1), HeadKind.FACTOR, 3)
    return Trainer(TrainableDrafter(spec, seed=1, scales=scales), rows, base, options)


def run(trainer: Trainer, until: int | None = None) -> list[StepLog]:
    logs: list[StepLog] = []
    trainer.run(logs.append, no_progress, until=until)
    return logs


def losses(logs: list[StepLog]) -> list[tuple[int, float, float]]:
    return [(line.step, line.loss, line.gradient_norm) for line in logs]


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    options = fit_options(max_steps=8)
    whole = make(options)
    expected = losses(run(whole))
    first = make(options)
    begun = losses(run(first, until=3))
    first.save(tmp_path / "state.safetensors")
    second = make(options)
    second.load(tmp_path / "state.safetensors")
    assert begun + losses(run(second)) == expected
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer = make(fit_options())
    run(trainer, until=1)
    trainer.save(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match="was saved by a run with other options"):
        make(fit_options(learning_rate=1e-4)).load(tmp_path / "state.safetensors")


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(InputError, match="is no training state"):
        make(fit_options()).load(tmp_path / "state.safetensors")


@pytest.mark.parametrize("autocast", [False, True])
def test_a_base_in_bfloat16_trains(autocast: bool) -> None:
    trainer = make(fit_options(autocast=autocast, max_steps=30, full_windows=2))
    small = BaseTensors(trainer.base.embedding.bfloat16(), trainer.base.head.bfloat16(), trainer.base.loss_vocab)
    rows = TrainingRows(trainer.rows.hidden.bfloat16(), trainer.rows.tokens, trainer.rows.document)
    logs = run(Trainer(trainer.model, rows, small, trainer.options))
    assert logs[-1].loss < logs[0].loss


def test_accumulation_changes_nothing() -> None:
    whole = run(make(fit_options(windows=4, full_windows=4)))
    parts = run(make(fit_options(windows=4, full_windows=2, accumulation=2)))
    assert [x.loss for x in parts] == pytest.approx([x.loss for x in whole], rel=1e-5)
    assert parts[-1].per_position == pytest.approx(whole[-1].per_position, rel=1e-5)


def test_a_restriction_to_every_token_changes_nothing() -> None:
    whole = make(fit_options(full_windows=4))
    restricted = make(fit_options(full_windows=0))
    assert [x[1] for x in losses(run(restricted))] == pytest.approx([x[1] for x in losses(run(whole))], rel=1e-4)


def test_the_restricted_loss_is_the_renormalised_one() -> None:
    trainer = make(fit_options(full_windows=0, windows=1, window=60), loss_vocab=12)
    loss = replace(trainer.options.loss, kd_weight=1.0, ce_weight=0.0, position_weights=(1.0, 0.0, 0.0))
    trainer.options = replace(trainer.options, loss=loss)
    found = trainer.loss(torch.tensor([0])).total.item()
    keep = trainer.base.loss_vocab
    rows, model = trainer.rows, trainer.model
    embedded = trainer.base.embedding[rows.tokens]
    state = model.core.next_state(torch.zeros_like(embedded), embedded)
    small = trainer.base.head[keep]
    student = torch.log_softmax(model.project(rows.hidden, state) @ small.T, dim=-1)
    teacher = torch.softmax(rows.hidden @ small.T, dim=-1)
    terms = [
        -(teacher[i + 1] * student[i]).sum().item()
        for i in range(60)
        if rows.document[i] == rows.document[i + 1] and rows.tokens[i + 1] in keep
    ]
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_the_rate_warms_up_and_ends_at_its_final_ratio() -> None:
    options = fit_options(max_steps=11, warmup_steps=2, learning_rate=1.0, final_lr_ratio=0.1, schedule="linear")
    assert [options.rate_at(s) for s in (0, 1, 2, 11)] == pytest.approx([0.5, 1.0, 1.0, 0.1])
    assert replace(options, schedule="cosine").rate_at(11) == pytest.approx(0.1)
    assert replace(options, schedule="constant").rate_at(9) == 1.0
