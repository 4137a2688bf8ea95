"""One base model, read alike by every command: where texts end, which tokens there are, and what greedy means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from tests.engines import write_tokenizer
from tests.tiny_models import write_drafter
from tests.training.conftest import VOCAB, train_options
from tests.training.test_train import evaluate_options
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.run import api
from trtllm_redrafter.training.answers import TransformersWriter
from trtllm_redrafter.training.evaluation import evaluate
from trtllm_redrafter.training.execute import answer_writer, train
from trtllm_redrafter.training.frozen_base import FrozenBase, load_tokenizer
from trtllm_redrafter.training.plan import plan_training
from trtllm_redrafter.verify.inspect import inspect

WISHES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "do_sample": True, "temperature": 0.6, "top_k": 2}


@pytest.fixture
def base(counting_base: Path, tmp_path: Path) -> Path:
    """It counts on from the last token of a prompt. Tests change the copy."""
    return Path(shutil.copytree(counting_base, tmp_path / "base"))


def change(path: Path, **values: Any) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (before | values).items() if v != "remove"}))


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        (None, ["end", 258]),  # in config.json alone
        ({"eos_token_id": None}, "end"),
        ({"eos_token_id": ["end"]}, None),
        ({"eos_token_id": 258, **WISHES}, "end"),
    ],
)
def test_texts_end_at_the_same_token_everywhere(generation: Any, config: Any, base: Path, tmp_path: Path) -> None:
    last = load_tokenizer(base).encode(">")[-1]  # of every prompt, as the chat template writes them
    end = last + 6

    def real(value: Any) -> Any:
        return [real(v) for v in value] if isinstance(value, list) else end if value == "end" else value

    (base / "generation_config.json").unlink()
    if generation is not None:
        change(base / "generation_config.json", **{k: real(v) for k, v in generation.items()})
    change(base / "config.json", eos_token_id=real(config))
    answer = list(range(last + 1, end + 1))
    options = train_options(base, tmp_path / "run", held_out=0.0)
    plan = plan_training(options)
    ends = set(plan.eos)
    assert {2, end} <= ends <= {2, end, 258}  # 2 is the tokenizer's
    frozen = FrozenBase.load(base, device="cpu", dtype="float32")
    prompts = [p.token_ids for p in plan.prompts]
    assert TransformersWriter(frozen).write(prompts, options.writing, 0) == [answer] * len(prompts)
    with answer_writer(plan, no_progress) as writer:
        assert writer is not None and writer.write(prompts, options.writing, 0) == [answer] * len(prompts)
    drafter = write_drafter(tmp_path / "drafter", vocab_size=VOCAB, draft_len=3)
    report = evaluate(evaluate_options(options, drafter=drafter), no_progress)
    assert report.tokens == len(answer) * len(prompts)
    api.convert(base, tmp_path / "checkpoint", drafter=drafter, num_beams=2)
    api.build(tmp_path / "checkpoint", tmp_path / "engine", max_seq_len=128)
    with api.load_engine(tmp_path / "engine") as engine:
        [result] = engine.generate(["Number A0"], max_tokens=24)
        assert result.token_ids == answer and str(result.finish_reason.value if result.finish_reason else "") == "stop"
    recorded = [
        Manifest.read(tmp_path / "checkpoint").derived["eos_token_ids"],
        *(inspect(path).facts["eos_token_ids"] for path in (base, tmp_path / "engine")),
        json.loads((tmp_path / "engine" / "config.json").read_text())["eos_token_ids"],
    ]
    assert all(set(ids) == ends and len(ids) == len(ends) for ids in recorded)


def test_an_engine_without_a_record_still_knows_config_jsons_tokens(base: Path, tmp_path: Path) -> None:
    """Engines of earlier versions have it in the checkpoint's manifest alone."""
    change(base / "config.json", eos_token_id=77)
    api.convert(base, tmp_path / "checkpoint")
    api.build(tmp_path / "checkpoint", tmp_path / "engine", max_seq_len=128)
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config.pop("eos_token_ids") == [2, 77]
    text = json.dumps(config)
    size = (tmp_path / "engine" / "config.json").stat().st_size
    (tmp_path / "engine" / "config.json").write_text(text + " " * (size - len(text)))
    with api.load_engine(tmp_path / "engine") as engine:
        assert engine.runner._eos == {2, 77}  # type: ignore[attr-defined]


def test_training_records_the_bases_weights(base: Path, tmp_path: Path) -> None:
    options = train_options(base, tmp_path / "run")
    train(plan_training(options), no_progress)
    config = json.loads((options.output / "config.json").read_text())
    api.convert(base, tmp_path / "checkpoint", drafter=options.output)
    manifest = Manifest.read(tmp_path / "checkpoint")
    assert len(config["base_model"]["weights_sample"]) == 64
    assert manifest.inputs["base"]["weights_sample"] == config["base_model"]["weights_sample"]
    assert not any("trained for" in note for note in manifest.notes)


def test_tokens_without_an_embedding_are_named(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("[PAD]", special=True, normalized=False)])
    tokenizer.save(str(base / "tokenizer.json"))
    options = train_options(base, tmp_path / "run")
    assert options.settings.prompts is not None
    options.settings.prompts.write_text('{"prompt": "fine"}\n\n{"prompt": "a [PAD]"}\n')
    message = r"line 3: token \d+ has the id 259 \('\[PAD\]'\), outside the model's vocabulary of 259"
    with pytest.raises(InputError, match=message):
        plan_training(options)
    drafter = write_drafter(tmp_path / "drafter", vocab_size=VOCAB, draft_len=3)
    with pytest.raises(InputError, match=message):
        evaluate(evaluate_options(options, drafter=drafter), no_progress)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "fine"}\n{"text": "a [PAD]"}\n')
    with pytest.raises(InputError, match=r"text 2: token 3 has the id 259 \('\[PAD\]'\)"):
        plan_training(train_options(base, tmp_path / "other", data=texts, prompts=None))


def break_file(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def other_model(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 259
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "says"), [(break_file, "cannot be loaded"), (other_model, "has 260 tokens, the model 259")]
)
def test_unusable_tokenizers_are_refused_at_every_step(damage: Any, says: str, base: Path, tmp_path: Path) -> None:
    bad = write_tokenizer(tmp_path / "bad")
    damage(bad)
    api.convert(base, tmp_path / "checkpoint")
    with pytest.raises(InputError, match=says):
        api.build(tmp_path / "checkpoint", tmp_path / "engine", tokenizer=bad, max_seq_len=64)
    assert not (tmp_path / "engine").exists()
    api.build(tmp_path / "checkpoint", tmp_path / "engine", max_seq_len=64)
    damage(tmp_path / "engine" / "tokenizer")
    with pytest.raises(InputError, match=r"changed since it was built|size has changed"):
        api.load_engine(tmp_path / "engine")
    damage(tmp_path / "checkpoint" / "tokenizer")
    with pytest.raises(InputError, match=r"file.s (size|content) has changed"):
        api.build(tmp_path / "checkpoint", tmp_path / "second", max_seq_len=64)
    damage(base)
    with pytest.raises(InputError, match=says):
        api.convert(base, tmp_path / "again")
    with pytest.raises(InputError, match=says):
        plan_training(train_options(base, tmp_path / "run"))
    assert "not known" in str(inspect(base).facts["eos_token_ids"])


def test_a_changed_tokenizer_of_the_same_size_is_not_loaded(base: Path, tmp_path: Path) -> None:
    """Its hash is checked at every load; those of the weights on request."""
    api.convert(base, tmp_path / "checkpoint")
    api.build(tmp_path / "checkpoint", tmp_path / "engine", max_seq_len=64)
    template = tmp_path / "engine" / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "assailant"))
    with pytest.raises(InputError, match="content has changed"):
        api.load_engine(tmp_path / "engine")


def test_another_tokenizer_than_the_bases_is_said(base: Path, tmp_path: Path) -> None:
    from trtllm_redrafter.backends import load_backend
    from trtllm_redrafter.backends.base import BuildOptions

    api.convert(base, tmp_path / "checkpoint")
    other = write_tokenizer(tmp_path / "other", 200)
    plans = [
        load_backend("torch").plan(
            BuildOptions(tmp_path / "checkpoint", tmp_path / "engine", "torch", tokenizer, 1, 63, 64, overwrite=False)
        )
        for tokenizer in (base, other)
    ]
    assert ["is not the tokenizer the base model came with" in plan.render() for plan in plans] == [False, True]
    assert "end tokens 2" in plans[0].render()


def test_a_file_that_joined_the_tokenizer_is_not_loaded(base: Path, tmp_path: Path) -> None:
    """transformers would read it because of its name; notes of people are not in its way."""
    api.convert(base, tmp_path / "checkpoint")
    api.build(tmp_path / "checkpoint", tmp_path / "engine", max_seq_len=64)
    (tmp_path / "engine" / "tokenizer" / "NOTES.md").write_text("ours")
    api.load_engine(tmp_path / "engine").close()
    for folder in ("checkpoint", "engine"):
        (tmp_path / folder / "tokenizer" / "added_tokens.json").write_text("{}")
    with pytest.raises(InputError, match="unknown file of the tokenizer"):
        api.load_engine(tmp_path / "engine")
    with pytest.raises(InputError, match="unknown file of the tokenizer"):
        api.build(tmp_path / "checkpoint", tmp_path / "again", max_seq_len=64)


def test_inspect_shows_the_recorded_end_tokens_everywhere(base: Path, tmp_path: Path) -> None:
    api.convert(base, tmp_path / "checkpoint")
    api.build(tmp_path / "checkpoint", tmp_path / "engine", max_seq_len=64)
    shown = [inspect(path).facts["eos_token_ids"] for path in (base, tmp_path / "checkpoint", tmp_path / "engine")]
    assert shown[0] and shown == [shown[0]] * 3
