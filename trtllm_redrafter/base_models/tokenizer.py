"""Which files of a model directory are its tokenizer, and how two tokenizers are told apart."""

from __future__ import annotations

from pathlib import Path

from trtllm_redrafter.fsio import sha256_file

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
    "generation_config.json",
)
"""What `build` and `run` need of the base model beside its weights: text to tokens, chat format, end tokens."""

IDENTITY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""The first of these that exists stands for the tokenizer."""


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizer's files in `path`, in the table's order; [] when there are none."""
    return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]


def has_tokenizer(path: Path) -> bool:
    """Can text be tokenized with what is in `path`? (generation_config.json alone is no tokenizer.)"""
    return any((path / name).is_file() for name in IDENTITY_FILES)


def tokenizer_sha256(path: Path) -> str | None:
    """SHA-256 of the file that defines the vocabulary; None for a directory without a tokenizer."""
    for name in IDENTITY_FILES:
        if (path / name).is_file():
            return sha256_file(path / name)
    return None
