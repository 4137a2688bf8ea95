"""A base model that counts, its tokenizer, and options for short runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines import write_tokenizer
from tests.tiny_models import write_base
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.settings.schema import TrainSection
from trtllm_redrafter.training.loss import LossOptions
from trtllm_redrafter.training.plan import TrainOptions
from trtllm_redrafter.training.trainer import FitOptions

VOCAB = 259
EOS = 2
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def add_tokenizer(base: Path) -> Path:
    """Bytes as tokens, and a chat template that ends turns as chat models do."""
    write_tokenizer(base)
    (base / "chat_template.jinja").write_text(CHAT)
    return base


@pytest.fixture(scope="session")
def counting_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever it reads, it goes on counting: token t is followed by t + 1, from 3 to the last and round again.

    Its layers add nothing, and row t + 1 of its head is the embedding of t.
    """
    base = write_base(tmp_path_factory.mktemp("counting") / "base", "llama", vocab_size=VOCAB)
    tensors = load_file(base / "model.safetensors")
    torch.manual_seed(0)
    embedding = torch.randn(VOCAB, 32)
    embedding = embedding / embedding.norm(dim=-1, keepdim=True)
    following = torch.tensor([3, 3, 3, *range(4, VOCAB), 3])
    tensors["model.embed_tokens.weight"] = embedding
    tensors["lm_head.weight"] = torch.zeros_like(embedding).index_add_(0, following[3:], embedding[3:])
    tensors["model.norm.weight"] = torch.ones(32)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name].zero_()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return add_tokenizer(base)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: its greedy texts wander and loop."""
    return add_tokenizer(write_base(tmp_path_factory.mktemp("random") / "base", "llama", vocab_size=VOCAB))


def fit_options(**changes: Any) -> FitOptions:
    loss = LossOptions(
        kd_weight=0.5,
        ce_weight=0.5,
        kd_temperature=1.0,
        position_weights=(1.0, 0.8, 0.6),
        chunk_windows=2,
        compile=False,
    )
    options = FitOptions(
        loss=loss,
        max_steps=6,
        window=16,
        windows=4,
        full_windows=4,
        accumulation=1,
        learning_rate=5e-3,
        final_lr_ratio=0.0,
        schedule="cosine",
        warmup_steps=2,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.98,
        clip_norm=1.0,
        autocast=False,
        seed=1,
        log_every=1,
    )
    return replace(options, **changes)


def train_options(base: Path, folder: Path, **changes: Any) -> TrainOptions:
    """A run on prompts, whose file is written here; `changes` are of the options or of the section."""
    prompts = folder / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(f'{{"prompt": "Number {chr(65 + i)}{i}"}}\n' for i in range(24)))
    settings = TrainSection(
        prompts=prompts, draft_len=3, num_layers=1, max_steps=6, window=16, windows=4, full_windows=4,
        learning_rate=5e-3, warmup_steps=2, weight_decay=0.0, chunk_windows=2, kd_weight=0.5, ce_weight=0.5,
        kd_temperature=1.0, position_decay=0.8, log_every=1, max_answer_tokens=24, seed=1, batch=7, max_text_tokens=120,
        held_out=0.25, draft_vocab=64, batch_tokens=512, save_every=2,
    )  # fmt: skip
    resolved: dict[str, Any] = {"grid": (DraftShape(1, 3), DraftShape(3, 2)), "dtype": "float32", "device": "cpu"}
    resolved |= {name: changes.pop(name) for name in list(changes) if name in TrainOptions.__annotations__}
    settings = settings.model_copy(update=changes)
    return TrainOptions(base, folder / "drafter", folder / "work", settings, **resolved)
