"""The tokenizer files of a model directory, and the hash that identifies a tokenizer."""

from __future__ import annotations

from pathlib import Path

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import read_json, sha256_file

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG,
)
"""Files that `build` and `run` need besides the weights: tokenizer, chat template, end tokens."""

IDENTITY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""The first of these that exists identifies the tokenizer."""


MODEL_CONFIG = "config.json"


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizer's files in `path`, in the table's order; [] if there are none.

    The model's config.json goes with them: `trtllm-serve` reads the model type from the tokenizer's directory, and
    transformers the tokenizer's class where the tokenizer does not name it. (A TensorRT-LLM checkpoint has a file of
    that name too.)
    """
    found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    return [*found, path / MODEL_CONFIG] if found and has_model_config(path) else found


def has_model_config(path: Path) -> bool:
    """Is the config.json in `path` a transformers config, which names the model type?"""
    file = path / MODEL_CONFIG
    try:
        return file.is_file() and isinstance(read_json(file).get("model_type"), str)
    except InputError:
        return False  # whoever needs the file says what is wrong with it


def has_tokenizer(path: Path) -> bool:
    """Is there a tokenizer in `path`? (generation_config.json alone is none.)"""
    return any((path / name).is_file() for name in IDENTITY_FILES)


def tokenizer_sha256(path: Path) -> str | None:
    """SHA-256 of the file that defines the vocabulary; None for a directory without a tokenizer."""
    for name in IDENTITY_FILES:
        if (path / name).is_file():
            return sha256_file(path / name)
    return None
