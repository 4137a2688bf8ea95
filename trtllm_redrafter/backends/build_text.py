"""The text side of a build: which tokenizer goes into the engine, whether it is the model's, and what ends a text.

text = build_text(options, checkpoint.config, checkpoint.manifest)
text.source, text.end_token_ids          # the directory it is copied from, (2,)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.base_models.tokenizer import has_tokenizer, tokenizer_files, tokenizer_sha256
from trtllm_redrafter.base_models.tokenizer_setup import tokenizer_setup
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import TOKENIZER_DIRECTORY
from trtllm_redrafter.errors import InputError, raise_together

_ENDS_SHOWN = 8


@dataclass(frozen=True)
class BuildText:
    """`source` is copied into the engine; None: there is nothing. `notes` are for people."""

    source: Path | None
    takes_text: bool
    end_token_ids: tuple[int, ...]
    notes: tuple[str, ...]

    def render(self) -> str:
        text = str(self.source) if self.takes_text else "no tokenizer: the engine will take token ids only"
        ends = ", ".join(map(str, self.end_token_ids[:_ENDS_SHOWN])) or "none known"
        return f"{text}; end tokens {ends}"


def tokenizer_source(options: BuildOptions) -> Path | None:
    """`--tokenizer`, or what `convert` put into the checkpoint; nothing is loaded."""
    if options.tokenizer is not None:
        if not has_tokenizer(options.tokenizer):
            remedy = "pass the directory that holds tokenizer.json"
            raise InputError("there is no tokenizer here", where=options.tokenizer, remedy=remedy)
        return options.tokenizer
    inside = options.checkpoint / TOKENIZER_DIRECTORY
    return inside if tokenizer_files(inside) else None


def build_text(options: BuildOptions, config: CheckpointConfig, manifest: Manifest | None) -> BuildText:
    """Load and check the tokenizer; `InputError` when it is damaged, or not for this model."""
    source = tokenizer_source(options)
    given = options.tokenizer is not None
    if manifest is not None and not given:
        problems = manifest.check_tokenizer(options.checkpoint)
        raise_together(InputError, problems, "the checkpoint's tokenizer is damaged", where=options.checkpoint)
    remedy = "pass the tokenizer of this model with --tokenizer" if given else "pass another one with --tokenizer"
    recorded = () if manifest is None else manifest.end_tokens
    text = tokenizer_setup(source, vocab_size=config.vocab_size, remedy=remedy, recorded=recorded)
    notes = list(text.notes)
    known = None if manifest is None else manifest.tokenizer_sha256
    if given and source is not None and known is not None and known != tokenizer_sha256(source):
        notes.append(f"{source} is not the tokenizer the base model came with: check that the two agree")
    return BuildText(source, text.tokenizer is not None, text.end_token_ids, tuple(notes))
