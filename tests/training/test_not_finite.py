"""train and evaluate end with one error where the base model's, the drafter's or the loss's numbers are not finite."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import write_drafter
from tests.training.conftest import VOCAB, fit_options, train_options
from tests.training.test_train import evaluate_options
from tests.training.test_trainer import make, run
from trtllm_redrafter.errors import NumericalError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.training.answers import TransformersWriter, WritingOptions
from trtllm_redrafter.training.evaluation import evaluate
from trtllm_redrafter.training.execute import train
from trtllm_redrafter.training.frozen_base import FrozenBase
from trtllm_redrafter.training.plan import plan_training


@pytest.fixture
def broken_base(random_base: Path, tmp_path: Path) -> Path:
    """One NaN among the weights of a layer."""
    base = tmp_path / "broken"
    shutil.copytree(random_base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_not_written_from_nan(broken_base: Path, temperature: float) -> None:
    """Greedily they were token 0 again and again; sampling ended in PyTorch's own error."""
    writer = TransformersWriter(FrozenBase.load(broken_base, device="cpu", dtype="float32"))
    with pytest.raises(NumericalError, match="the base model's logits are not finite"):
        writer.write([[5, 6], [7]], WritingOptions(4, temperature, 1, 2), 0)


def test_training_and_evaluation_refuse_the_base(broken_base: Path, tmp_path: Path) -> None:
    options = train_options(broken_base, tmp_path / "run")
    with pytest.raises(NumericalError, match=r"broken: the base model's .* are not finite"):
        train(plan_training(options), no_progress)
    assert not options.output.exists()
    with pytest.raises(NumericalError, match="the base model's hidden states are not finite"):
        FrozenBase.load(broken_base, device="cpu", dtype="float32").hidden([[5, 6, 7]])


def test_evaluation_names_a_broken_drafter(random_base: Path, tmp_path: Path) -> None:
    options = train_options(random_base, tmp_path / "run")
    drafter = write_drafter(tmp_path / "drafter", vocab_size=VOCAB, draft_len=3)
    tensors = load_file(drafter / "model.safetensors")
    tensors["rnn_u.bias"][0] = float("inf")
    save_file(tensors, drafter / "model.safetensors")
    with pytest.raises(NumericalError, match="the drafter's scores are not finite"):
        evaluate(replace(evaluate_options(options), drafter=drafter), no_progress)


def test_a_loss_that_diverges_ends_training_before_it_is_saved() -> None:
    trainer = make(fit_options(max_steps=4))
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(NumericalError, match="training diverged: at step 1 the loss is nan") as caught:
        run(trainer)
    assert "train.learning_rate" in str(caught.value)
