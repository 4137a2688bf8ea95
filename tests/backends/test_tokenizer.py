"""Tokenizer directories as transformers 4 and 5 write them, read by whichever is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engines import write_tokenizer
from trtllm_redrafter.backends.tokenizer import EngineTokenizer
from trtllm_redrafter.errors import InputError


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend", None])
def test_names_of_both_transformers(tmp_path: Path, name: str | None) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = EngineTokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("Hé!")) == "Hé!"
    assert tokenizer.eos_token_id == 2 and tokenizer.has_chat_template
    assert tokenizer.encode_prompt("x", chat=True) != tokenizer.encode_prompt("x", chat=False)


def test_a_tokenizer_alone(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(write_tokenizer(tmp_path) / "tokenizer.json", tmp_path / "alone")
    tokenizer = EngineTokenizer(tmp_path / "alone")
    assert tokenizer.encode("A") == [EngineTokenizer(tmp_path).encode("A")[0]] and not tokenizer.has_chat_template


def test_a_broken_file(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        EngineTokenizer(folder)
