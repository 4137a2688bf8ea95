"""The scripts that train a coding model's drafter: prompts, what is kept out of them, all phases on a tiny model."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import write_base
from tests.training.conftest import VOCAB, add_tokenizer
from trtllm_redrafter.training.rows import TrainingRows

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = (
    "data.batch=4 data.prompts=6 data.own_stubs=2 data.own_exercises=2 data.own_turns=2 data.max_tokens=6 "
    "data.max_prompt_tokens=4000 data.cache_tokens=100000 fit.windows=3 fit.log_every=2 fit.warmup_steps=1 "
    "fit.max_steps=5 calibration=[1,2] save_every=1 draft_vocab=64 loss_vocab=32 loss.chunk_windows=2 "
    "drafter.exit_dim=16 drafter.num_layers=1 measure.prompts=2 measure.max_tokens=5 measure.vocabularies=[16]"
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(SCRIPTS))
    names = ("code_prompts", "train_code_drafter", "batch_llama", "humaneval_prompts")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases on queries, keys and values, and one matrix for both ends."""
    folder = tmp_path_factory.mktemp("qwen") / "base"
    return add_tokenizer(write_base(folder, "qwen2", vocab_size=VOCAB, tie_word_embeddings=True))


def test_the_batch_writes_what_transformers_would(scripts: dict[str, ModuleType], qwen: Path) -> None:
    prompts = [[5, 6, 7, 8], [9], [40, 41]]
    found = scripts["batch_llama"].BatchLlama(qwen, "cpu", torch.float32).generate(prompts, 8, 0.0)
    model = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    for i, prompt in enumerate(prompts):
        written = found.tokens[i, : found.lengths[i]].tolist()
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *written]])
            states = model.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
            assert model.lm_head(states).argmax(dim=-1).tolist() == written
        assert torch.allclose(states, found.hidden[i, : len(written)], atol=1e-4)


def test_prompts_differ_and_repeat_with_the_seed(scripts: dict[str, ModuleType]) -> None:
    module = scripts["code_prompts"]
    rows, _ = module.build(400, 3, module.Overlap([]))
    assert {row["category"] for row in rows} == set(module.KINDS)
    texts = [module.text_of(row.get("messages") or row["prompt"]) for row in rows]
    assert len(set(texts)) == 400 and not any("{" + name in text for text in texts for name in ("stub", "who", "a}"))
    assert module.build(400, 3, module.Overlap([]))[0] == rows


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Now: count the vowels, in every word of a long sentence!", "8 words in a row"),
        ("def count_vowels(x):\n    pass", "function name"),
        ("What is count_vowels?", "function name"),
        ("Describe the history of bread.", None),
        ("Count the vowels in a name", "3-grams"),
        ("Count the letters of a name and its vowels", None),
        ("Tell me why the sky is blue", "3-grams"),
    ],
)
def test_what_is_near_a_held_out_prompt_is_found(scripts: dict[str, ModuleType], text: str, why: str | None) -> None:
    held_out = [
        'def count_vowels(s):\n    """Count the vowels in every word of a long sentence and more."""',
        "Please tell me why the sky is blue",
    ]
    assert scripts["code_prompts"].Overlap(held_out).why(text) == why


def test_held_out_prompts_are_read_from_both_kinds_of_files(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "y.gz").write_bytes(gzip.compress(b'{"prompt": "d"}\n'))
    found = scripts["code_prompts"].held_out_texts([tmp_path / "x.jsonl", tmp_path / "y.gz"])
    assert found == ["a", "b", "d"]


def test_humaneval_becomes_a_prompts_file_without_solutions(scripts: dict[str, ModuleType]) -> None:
    row = {"task_id": "HumanEval/7", "prompt": "def f():\n    pass\n", "canonical_solution": "secret", "test": "secret"}
    [line] = scripts["humaneval_prompts"].prompts(gzip.compress(json.dumps(row).encode()))
    assert line["id"] == "humaneval-7" and "def f()" in line["prompt"] and "secret" not in json.dumps(line)


STUB = 'import math\n\ndef area(r: float) -> float:\n    """Area of a circle.\n    >>> area(0)\n    0.0\n    """\n'


@pytest.mark.parametrize(
    ("text", "stub"),
    [
        (f"Here it is:\n```python\n{STUB}    return math.pi * r ** 2\n```\nDone.", STUB),
        (f"{STUB}    return 1", STUB),
        ('```python\n"""Docstring first."""\ndef f(x):\n    return x\n```', None),
        ('def f(x):\n    """never ends', None),
    ],
)
def test_a_head_is_cut_out_of_an_answer(scripts: dict[str, ModuleType], text: str, stub: str | None) -> None:
    assert scripts["train_code_drafter"].docstring_stub(text) == stub


def test_batches_keep_to_the_cache_and_lose_no_prompt(scripts: dict[str, ModuleType]) -> None:
    ids = [[0] * n for n in (5, 90, 7, 50, 3, 60, 8)]
    data = {"batch": 4, "max_tokens": 10, "cache_tokens": 150}
    groups = scripts["train_code_drafter"].batches(ids, list(range(7)), data)
    assert sorted(i for group in groups for i in group) == list(range(7))
    for group in groups:
        assert len(group) <= 4 and len(group) * (max(len(ids[i]) for i in group) + 10) <= 150


def test_parts_come_back_as_one_list_of_documents(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    module = scripts["train_code_drafter"]
    writer = module.PartWriter(tmp_path)
    for first in (0, 10):
        hidden = torch.arange(first, first + 3).unsqueeze(1).bfloat16()
        writer.add(TrainingRows(hidden, torch.arange(first, first + 3).int(), torch.tensor([0, 0, 1]).int()))
    writer.wait()
    (tmp_path / "part0009.tmp").write_text("half of one")
    rows = module.load_rows(tmp_path, "cpu")
    assert rows.tokens.tolist() == [0, 1, 2, 10, 11, 12] and rows.document.tolist() == [0, 0, 1, 2, 2, 3]
    assert rows.hidden[:, 0].tolist() == rows.tokens.tolist() and writer.rows == 6


def test_all_phases_on_a_tiny_model(
    scripts: dict[str, ModuleType], qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, held = scripts["train_code_drafter"], tmp_path / "held.jsonl"
    held.write_text('{"prompt": "Why?", "category": "q"}\n{"prompt": "How?", "category": "q"}\n')
    rows, _ = scripts["code_prompts"].build(6, 1, scripts["code_prompts"].Overlap([]))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(module, "own_prompts", lambda *_: ["Say something new.", "Why is this near? Why?"])

    def run(phase: str, *more: Any) -> None:
        chosen = [part for item in TINY.split() for part in ("--set", item)]
        fixed = ["x", phase, "--model", qwen, "--work", tmp_path / "work", "--device", "cpu", "--seconds", 30]
        monkeypatch.setattr(sys, "argv", [*map(str, (*fixed, *chosen, *more))])
        assert module.main() == 0

    run("write", "--prompts", tmp_path / "prompts.jsonl")
    written = json.loads((tmp_path / "work" / "written.json").read_text())
    assert written["answers"] >= 8 and written["own"] == 2
    answers = [json.loads(line) for line in (tmp_path / "work" / "answers.jsonl").read_text().splitlines()]
    assert sum(len(a["answer"]) for a in answers) == written["answer_tokens"]
    assert {a["temperature"] for a in answers} == {0.0, 0.7}
    run("train", "--output", tmp_path / "drafter")
    metrics = json.loads((tmp_path / "drafter" / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 5 and metrics["training"]["unfinished"] is False
    assert metrics["data"] == written and (tmp_path / "work" / "drafter-so-far" / "model.safetensors").exists()
    grid = ["--grid", "1x3,2x7", "--report", tmp_path / "report.json"]
    run("measure", "--drafter", tmp_path / "drafter", "--held-out", held, *grid)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"drafter/held/whole", "drafter/held/16"}
    assert [a["setting"] for a in report["drafter/held/whole"]["acceptance"]] == ["1x3", "2x7"]
    assert report["drafter/held/whole"]["acceptance"][0]["acceptance_length"] >= 1
