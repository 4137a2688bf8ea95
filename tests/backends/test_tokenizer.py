"""Tokenizer directories as transformers 4 and 5 write them, read by whichever is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.engines import write_tokenizer
from trtllm_redrafter.backends.tokenizer import EngineTokenizer
from trtllm_redrafter.errors import InputError, RequestError
from trtllm_redrafter.prompts.messages import Prompt

VERSION_5 = {"backend": "tokenizers", "is_local": True, "extra_special_tokens": ["<s>", "</s>"]}
"""What transformers 5 writes beside the class."""


def with_settings(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("settings", [{}, VERSION_5, {"extra_special_tokens": [{"content": "</s>"}]}])
@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "LaterTokenizer", None]
)
def test_names_of_both_transformers(tmp_path: Path, name: str | None, settings: dict[str, Any]) -> None:
    tokenizer = EngineTokenizer(with_settings(tmp_path / "tokenizer", tokenizer_class=name, **settings))
    assert tokenizer.decode(tokenizer.encode("Hé!")) == "Hé!"
    assert tokenizer.eos_token_id == 2 and tokenizer.has_chat_template
    assert tokenizer.encode_prompt(Prompt("x", chat=True)) != tokenizer.encode_prompt(Prompt("x", chat=False))


def test_special_tokens_of_version_5_are_special(tmp_path: Path) -> None:
    """A listed token that tokenizer.json does not have yet becomes one, and is left out of decoded text."""
    folder = with_settings(tmp_path / "tokenizer", extra_special_tokens=["<|turn|>"])
    tokenizer = EngineTokenizer(folder)
    [token] = tokenizer.encode("<|turn|>")
    assert token == 259 and tokenizer.decode([5, token], skip_special_tokens=True) == tokenizer.decode([5])


def test_a_tokenizer_alone(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(write_tokenizer(tmp_path) / "tokenizer.json", tmp_path / "alone")
    tokenizer = EngineTokenizer(tmp_path / "alone")
    assert tokenizer.encode("A") == [EngineTokenizer(tmp_path).encode("A")[0]] and not tokenizer.has_chat_template


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_model(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"type": "Later"}}))


BROKEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no object": ("tokenizer.json", lambda p: p.write_text('{"model": 3}')),
    "one brace": ("tokenizer.json", lambda p: p.write_text("{")),
    "empty": ("tokenizer.json", lambda p: p.write_text("")),
    "half": ("tokenizer.json", half),
    "not text": ("tokenizer.json", lambda p: p.write_bytes(b"\xff\xfe\x00")),
    "unknown kind": ("tokenizer.json", other_model),
    "settings": ("tokenizer_config.json", lambda p: p.write_text("[]")),
    "settings of wrong types": ("tokenizer_config.json", lambda p: p.write_text('{"added_tokens_decoder": 5}')),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_broken_files_are_one_message(case: str, name: str, tmp_path: Path) -> None:
    folder = with_settings(tmp_path / "tokenizer", tokenizer_class=name)
    file, damage = BROKEN[case]
    damage(folder / file)
    with pytest.raises(InputError) as caught:
        EngineTokenizer(folder)
    assert "tokenizer" in str(caught.value.problem.where) and caught.value.problem.remedy
    assert len(caught.value.render()) < 1000 and caught.value.render().count("\n") <= 2


def test_the_file_itself_is_named_as_the_reason(tmp_path: Path) -> None:
    """Where transformers would go on to files of other formats, and miss those."""
    folder = with_settings(tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(Exception, match=r".") as expected:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    with pytest.raises(InputError) as caught:
        EngineTokenizer(folder)
    assert str(expected.value) in str(caught.value.problem.why)


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    tokenizer = EngineTokenizer(write_tokenizer(tmp_path))
    with pytest.raises(RequestError, match="cannot be tokenized"):
        tokenizer.encode("half a pair: \ud83d")


def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class that only the directory knows is refused; one that transformers knows is used instead."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder, mark = tmp_path / "tokenizer", tmp_path / "ran"
    auto_map = {"AutoTokenizer": [None, "own.Own"]}
    with_settings(folder, tokenizer_class="Own", auto_map=auto_map)
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    with pytest.raises(InputError, match="needs custom Python code, which is never run"):
        EngineTokenizer(folder)
    for name in (None, "PreTrainedTokenizerFast", "Qwen2Tokenizer"):
        with_settings(folder, tokenizer_class=name, auto_map=auto_map)
        if name is not None:
            assert EngineTokenizer(folder).encode("A")
    assert not mark.exists()
