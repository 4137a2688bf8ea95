"""Prompts and self-written answers for the SmolLM2 drafter: what it is trained on and what it is measured on.

Three kinds of prompts, all answered by the base model itself, greedily and sampled:

    given      data/train_prompts.jsonl
    template   data/templates.txt x data/topics.txt
    own        user turns that the base model writes when only the chat header is given

The settings can name a list made by an earlier run instead (`data/smollm2_train_prompts.jsonl.xz` is the shipped
drafter's).

`data/eval_prompts.jsonl` is for measuring alone: its prompts are dropped wherever they turn up, and prompts from the
templates or the model's own hand that mention one of its topics are dropped too.
"""

from __future__ import annotations

import json
import lzma
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from batch_llama import Answers, BatchLlama
from tokenizers import Tokenizer

from trtllm_redrafter.training.rows import TrainingRows

DATA = Path(__file__).resolve().parent / "data"
HEADER = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
FOOTER = "<|im_end|>\n<|im_start|>assistant\n"
"""The chat template's text around a single user turn."""

EVAL_TOPICS = (
    "packing a suitcase|wind power|trees|exercise|cloud computing|voting|the internet|basketball|family|creativity|"
    "acids and bases|snow|fishing|rivers|gardening|London|theater|productivity|light|Paris|smallest number|capitalizes"
)
CATEGORIES = (
    ("code", "Python function"),
    ("poem", "poem"),
    ("story", "short story"),
    ("dialogue", "dialogue"),
    ("email", "email"),
    ("list", "tips|facts|questions|mistakes|advantages"),
)


@dataclass(frozen=True)
class Pass:
    """One answer per prompt: at which temperature (0: greedy) and how long at most."""

    temperature: float
    max_tokens: int


def read_prompts(name: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def answered_prompts(name: str) -> list[str]:
    """The list of an earlier run, in its order; the model's own prompts come out differently on other hardware."""
    with lzma.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def template_prompts() -> list[str]:
    topics = [t.strip() for t in re.split(r"[;\n]", (DATA / "topics.txt").read_text(encoding="utf-8")) if t.strip()]
    templates = (DATA / "templates.txt").read_text(encoding="utf-8").splitlines()
    return [template.format(topic) for template in templates for topic in topics]


def own_prompts(model: BatchLlama, tokenizer: Tokenizer, count: int, batch: int) -> list[str]:
    """User turns the model writes itself: ended, of sensible length, each once."""
    header = tokenizer.encode(HEADER, add_special_tokens=False).ids
    found: dict[str, None] = {}
    for _ in range(-(-count // batch)):
        turns = model.generate([header] * batch, max_tokens=96, temperature=0.85)
        ended = turns.tokens.gather(1, (turns.lengths - 1).unsqueeze(1))[:, 0] == model.end
        for tokens, length, done in zip(turns.tokens.tolist(), turns.lengths.tolist(), ended.tolist(), strict=True):
            text = tokenizer.decode(tokens[: length - 1]).strip()
            if done and length >= 5 and "\ufffd" not in text:
                found[text] = None
    return list(found)


def without_evaluation(prompts: Sequence[str]) -> list[str]:
    """Drop evaluation prompts and whatever mentions their topics."""
    measured = {p.lower() for p in read_prompts("eval_prompts.jsonl")}
    topic = re.compile(rf"\b({EVAL_TOPICS})\b", re.IGNORECASE)
    return [p for p in prompts if p.lower() not in measured and not topic.search(p)]


def category(prompt: str) -> str:
    return next((name for name, words in CATEGORIES if re.search(words, prompt)), "explain")


def chat_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    texts = [HEADER + prompt + FOOTER for prompt in prompts]
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def answer(
    model: BatchLlama,
    prompts: Sequence[list[int]],
    passes: Sequence[Pass],
    batch: int,
    max_seconds: float,
    say: Callable[[str], None],
) -> TrainingRows:
    """Rows of every pass's answers, batch after batch of prompts, until all are answered or the time is up.

    The prompts' order is random, so that a run cut short by time has seen a fair part of every kind.
    """
    started, parts = time.perf_counter(), []
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        parts += [flatten(model.generate(chosen, work.max_tokens, work.temperature), 0) for work in passes]
        spent = time.perf_counter() - started
        say(f"{start + len(chosen)}/{len(prompts)} prompts, {sum(map(len, parts))} tokens, {spent:.0f} s")
        if spent > max_seconds:
            break
    return concatenate(parts)


def flatten(answers: Answers, first_document: int) -> TrainingRows:
    """The padded batch as rows, without what follows the end token."""
    count, width = answers.tokens.shape
    real = torch.arange(width, device=answers.tokens.device) < answers.lengths.unsqueeze(1)
    document = torch.arange(first_document, first_document + count, device=answers.tokens.device).unsqueeze(1)
    return TrainingRows(
        answers.hidden[real], answers.tokens[real].to(torch.int32), document.expand(-1, width)[real].to(torch.int32)
    )


def concatenate(parts: Sequence[TrainingRows]) -> TrainingRows:
    """Row lists behind each other; texts of different lists stay different texts."""
    documents, base = [], 0
    for part in parts:
        documents.append(part.document - int(part.document[0]) + base)
        base = int(documents[-1][-1]) + 1
    return TrainingRows(
        torch.cat([p.hidden for p in parts]), torch.cat([p.tokens for p in parts]), torch.cat(documents)
    )


def training_prompts(
    model: BatchLlama, tokenizer: Tokenizer, own: int, template: int, batch: int, seed: int
) -> list[str]:
    """All prompts to answer, each once, in random order: given ones, a draw from the templates, the model's own."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    drawn = template_prompts()
    draw.shuffle(drawn)
    written = own_prompts(model, tokenizer, own, batch) if own else []
    added = without_evaluation([*drawn[:template], *written])
    prompts = list(dict.fromkeys([*read_prompts("train_prompts.jsonl"), *added]))
    draw.shuffle(prompts)
    return prompts
