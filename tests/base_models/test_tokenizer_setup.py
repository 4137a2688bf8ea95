"""End tokens from every place that names them, and tokenizers that are, or are not, the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from tests.engines import write_tokenizer
from trtllm_redrafter.base_models.tokenizer import first_beyond
from trtllm_redrafter.base_models.tokenizer_setup import TokenizerSetup, end_tokens, tokenizer_setup
from trtllm_redrafter.errors import InputError

VOCAB = 259


class Named:
    """A tokenizer as far as its end token goes."""

    def __init__(self, eos: int | None) -> None:
        self.eos_token_id = eos


def write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "recorded", "ids"),
    [
        (None, None, None, (), ()),
        (None, {"eos_token_id": [7, 9]}, None, (), (7, 9)),  # only config.json
        ({}, {"eos_token_id": 7}, None, (), (7,)),
        ({"eos_token_id": None}, {"eos_token_id": 7}, None, (), (7,)),
        ({"eos_token_id": 7}, {"eos_token_id": None}, 9, (), (7, 9)),  # generation_config and tokenizer differ
        ({"eos_token_id": [9, 7]}, {"eos_token_id": 7}, 2, [3], (9, 7, 2, 3)),
        ({"eos_token_id": 0}, {}, None, (), (0,)),
    ],
)
def test_end_tokens_are_the_union(
    generation: Any, config: Any, tokenizer: int | None, recorded: Any, ids: tuple[int, ...], tmp_path: Path
) -> None:
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        if values is not None:
            write_json(tmp_path / name, **values)
    found = end_tokens(tmp_path, Named(tokenizer), vocab_size=10, recorded=recorded)
    assert found.ids == ids and found.notes == ()


def test_end_tokens_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "generation_config.json", eos_token_id=[2, 10, -1])
    found = end_tokens(tmp_path, Named(10), vocab_size=10)
    assert found.ids == (2,)
    assert [note.split(" is never")[0] for note in found.notes] == [
        "the end token 10 of generation_config.json",
        "the end token -1 of generation_config.json",
        "the end token 10 of the tokenizer",
    ]


@pytest.mark.parametrize("value", ["2", 2.0, True, [2, None], {"id": 2}])
def test_what_is_no_token_id_is_refused(value: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", eos_token_id=value)
    with pytest.raises(InputError, match=r"eos_token_id is .*\n.*config.json must name a token id"):
        end_tokens(tmp_path, None, vocab_size=10)


def read(folder: Path, vocab_size: int = VOCAB) -> TokenizerSetup:
    return tokenizer_setup(folder, vocab_size=vocab_size, remedy="pass another one")


def add_tokens(folder: Path, *names: str) -> None:
    """Added tokens from id 259 up."""
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(path)


def set_template(folder: Path, template: str, **settings: Any) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    write_json(path, **(json.loads(path.read_text()) | {"chat_template": template} | settings))


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert read(tmp_path).tokenizer is not None and read(tmp_path, 300).notes == ()
    with pytest.raises(InputError, match=r"the tokenizer has 259 tokens, the model 258\n(.*\n)*.*pass another one"):
        read(tmp_path, 258)


def test_unused_tokens_beyond_the_embedding_are_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    add_tokens(tmp_path, "[PAD]", "message")
    set_template(tmp_path, "{% for message in messages %}{{ message.content }}{% endfor %}")  # no text of it
    text = read(tmp_path)
    assert text.tokenizer is not None and text.end_token_ids == (2,)
    [note] = text.notes
    assert "beyond the model's 259" in note and note.endswith("refused: '[PAD]' (259), 'message' (260)")
    assert first_beyond(text.tokenizer.encode("a[PAD]"), vocab_size=VOCAB) == (1, 259)
    assert first_beyond((0, 258), vocab_size=VOCAB) is None


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        ("{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}", {}),
        ("{{ '<|turn|>' + messages[0].content }}", {}),
        ("{{ messages[0].content + pad_token }}", {"pad_token": "<|turn|>"}),
        ([{"name": "default", "template": "{{ messages }}"}, {"name": "tools", "template": "<|turn|>"}], {}),
    ],
)
def test_chat_templates_of_tokens_beyond_the_embedding(template: str, settings: Any, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    add_tokens(tmp_path, "<|turn|>")
    set_template(tmp_path, template, **settings)
    assert read(tmp_path, 260).notes == ()
    with pytest.raises(InputError, match=r"the chat template writes '<\|turn\|>', beyond the model's 259"):
        read(tmp_path)


def test_a_prefix_beyond_the_embedding(tmp_path: Path) -> None:
    from tokenizers import processors

    write_tokenizer(tmp_path)
    add_tokens(tmp_path, "<new>")
    path = str(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(single="<new> $A", special_tokens=[("<new>", 259)])
    tokenizer.save(path)
    with pytest.raises(InputError, match="adds the token 259 to every text"):
        read(tmp_path)
