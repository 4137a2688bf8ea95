"""A drafter's directory: its sizes, how far ahead it was trained, its tensors, and everything wrong with them.

    drafter = DrafterFiles.open(Path("redrafter_vicuna-7b_n_5_lr_0.001_layers_2"))
    drafter.config, drafter.horizon            # DrafterConfig(...), 5
    shape, notes, problems = draft_shape(options, drafter)

Nothing may be missing and nothing may be left over: a part that is dropped silently changes what is drafted, and
shows only as a low acceptance. Such problems are listed, not raised, so that they are reported beside what does not
fit the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.draft_vocab import draft_vocab_problems
from trtllm_redrafter.checkpoint.fields import FieldReader
from trtllm_redrafter.checkpoint.names import DRAFT_VOCAB_FILE, LM_HEAD
from trtllm_redrafter.conversion.drafter_weights import FACTOR, read_weights, weight_file
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.sources import Folded, Source
from trtllm_redrafter.errors import InputError, Problem, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.redrafter.config import (
    MAX_DRAFT_LEN,
    MAX_NUM_BEAMS,
    NVIDIA_DRAFT_LEN,
    NVIDIA_NUM_BEAMS,
    DrafterConfig,
    DraftShape,
)

HORIZON_IN_NAME = re.compile(r"_n_(\d+)(?:_|$)")
"""Apple's trainer names its output `…_n_5_lr_…`: the drafter was trained on 5 tokens after the guaranteed one."""


@dataclass(frozen=True)
class DrafterFiles:
    """An opened drafter: sizes, training horizon, its tensors by TensorRT-LLM name, and what is wrong with them."""

    path: Path
    config: DrafterConfig
    horizon: int | None
    horizon_source: str
    num_beams: int | None
    tie_lm_head: bool
    tensors: Mapping[str, Source]
    factor: Source | None
    files: tuple[Path, ...]
    draft_vocab: Path | None
    base_identity: Mapping[str, Any]
    problems: tuple[Problem, ...]

    @classmethod
    def open(cls, path: Path) -> DrafterFiles:
        """Read config and headers.

        `InputError` when a file cannot be read; tensors that do not fit end up in `problems`, so that the caller can
        report them beside what does not fit the base.
        """
        if not path.is_dir():
            raise InputError("the drafter directory does not exist", where=path, remedy="check --drafter")
        raw = read_json(path / "config.json")
        fields = FieldReader(raw, path / "config.json")
        config = DrafterConfig(
            vocab_size=fields.size("vocab_size"),
            hidden_size=fields.size("hidden_size"),
            exit_dim=fields.size("exit_dim"),
            num_layers=fields.size("num_draft_layers", minimum=0),
            rnn=fields.flag("rnn", None),
        )
        horizon, horizon_source = _horizon(path, fields)
        beams, tied = fields.optional_size("num_beams"), fields.flag("tie_lm_head", False)
        raise_together(InputError, fields.problems, "the drafter's config.json is not usable", where=path)
        weights = weight_file(path)
        named, problems = read_weights(weights, config.num_layers)
        factor = named.pop(FACTOR, None)
        problems += _tensor_problems(config, named, factor, tied, weights)
        vocab = path / DRAFT_VOCAB_FILE if (path / DRAFT_VOCAB_FILE).exists() else None
        problems += [] if vocab is None else draft_vocab_problems(vocab, config.vocab_size)
        identity = raw.get("base_model")
        return cls(
            path=path,
            config=config,
            horizon=horizon,
            horizon_source=horizon_source,
            num_beams=beams,
            tie_lm_head=tied,
            tensors=named,
            factor=factor,
            files=tuple(p for p in (path / "config.json", weights, vocab) if p is not None),
            draft_vocab=vocab,
            base_identity=identity if isinstance(identity, dict) else {},
            problems=tuple(problems),
        )

    def sources(self, head: tuple[Source, ...]) -> dict[str, tuple[Source, ...]]:
        """What each tensor is made of; a tied LM head is the base's `head`, or it times the factor."""
        sources: dict[str, tuple[Source, ...]] = {name: (tensor,) for name, tensor in self.tensors.items()}
        if self.tie_lm_head:
            assert head
            sources[LM_HEAD] = head if self.factor is None else (Folded(head, self.factor),)
        return sources


def _horizon(path: Path, fields: FieldReader) -> tuple[int | None, str]:
    """How many tokens ahead the drafter was trained, and who says so."""
    stated = fields.optional_size("draft_len")
    if stated is not None:
        return stated, "draft_len in the drafter's config.json"
    for name in (path.name, path.resolve().name):
        if match := HORIZON_IN_NAME.search(name):
            return int(match[1]), f"the drafter's directory name ({name})"
    return None, "not stated"


def _tensor_problems(
    config: DrafterConfig, tensors: Mapping[str, Source], factor: Source | None, tied: bool, path: Path
) -> Iterator[Problem]:
    expected = config.parameter_shapes()
    if tied:
        del expected[LM_HEAD]
        yield from _tied_problems(config, tensors, factor, path)
    elif factor is not None:
        remedy = "set tie_lm_head to true in its config.json"
        yield Problem(f"{FACTOR!r} is there, but tie_lm_head is not true", str(path), None, remedy)
    for name, shape in expected.items():
        source = tensors.get(name)
        if source is None:
            why = "TensorRT-LLM would load such a drafter without an error" if name == LM_HEAD else None
            yield Problem(f"the drafter has no {name!r}", str(path), why, "use the complete drafter")
        elif source.shape != shape:
            why = f"its config.json implies {list(shape)}, the file has {list(source.shape)}"
            yield Problem(f"the drafter's {name!r} has the wrong shape", str(path), why, "use the right config.json")
        elif source.dtype not in ("F16", "BF16", "F32"):
            why = f"it is {source.dtype}; F16, BF16 or F32 is needed"
            yield Problem(f"the drafter's {name!r} is not a floating tensor", str(path), why, "save it as bfloat16")
    allowed = {*expected, LM_HEAD} if tied else set(expected)
    for name in sorted(set(tensors) - allowed):
        why = "with rnn false or exit_dim twice the hidden size, some parts do not exist"
        yield Problem(f"the drafter has {name!r}, its config.json has no place for it", str(path), why, "correct it")


def _tied_problems(
    config: DrafterConfig, tensors: Mapping[str, Source], factor: Source | None, path: Path
) -> Iterator[Problem]:
    if LM_HEAD in tensors:
        yield Problem("tie_lm_head is true, but the file has an LM head", str(path), None, "remove one of the two")
    width = (config.hidden_size, config.exit_dim)
    if factor is None and config.hidden_size != config.exit_dim:
        yield Problem(
            f"tie_lm_head is true, but exit_dim {config.exit_dim} is not the hidden size {config.hidden_size}",
            str(path),
            f"the base's LM head has {config.hidden_size} columns, and there is no {FACTOR!r}",
            "use the complete drafter",
        )
    elif factor is not None and (factor.shape != width or factor.dtype not in ("F16", "BF16", "F32")):
        why = f"floating {list(width)} is needed, the file has {factor.dtype} {list(factor.shape)}"
        yield Problem(f"{FACTOR!r} does not fit", str(path), why, "use the right config.json")


def draft_shape(options: ConvertOptions, drafter: DrafterFiles) -> tuple[DraftShape, list[str], list[Problem]]:
    """The draft shape, where each number comes from, and what is wrong with it.

    From the options, else from the drafter, else NVIDIA's converter. It never exceeds what the drafter was trained for:
    beyond it the recurrence runs on states it has not seen, acceptance falls, and nothing says so at run time.
    """
    notes = []
    beams, draft_len = options.num_beams, options.draft_len
    if beams is None:
        beams = drafter.num_beams or NVIDIA_NUM_BEAMS
        source = "the drafter's config.json" if drafter.num_beams else "the default of NVIDIA's converter"
        notes.append(f"num_beams {beams}: {source}")
    if draft_len is None:
        draft_len = drafter.horizon or NVIDIA_DRAFT_LEN
        source = drafter.horizon_source if drafter.horizon else "the default of NVIDIA's converter"
        notes.append(f"draft_len {draft_len}: {source}")
    if drafter.horizon is None:
        notes.append(f"the drafter does not say how far ahead it was trained; draft_len {draft_len} is not checked")
    return DraftShape(beams, draft_len), notes, list(_shape_problems(beams, draft_len, drafter))


def _shape_problems(beams: int, draft_len: int, drafter: DrafterFiles) -> Iterator[Problem]:
    highest = min(MAX_NUM_BEAMS, drafter.config.vocab_size)
    if not 1 <= beams <= highest:
        why = f"beyond the drafter's top {MAX_NUM_BEAMS} tokens, TensorRT-LLM accepts drafts without a test"
        yield Problem(f"num_beams is {beams}", "--num-beams", why, f"use 1 to {highest}")
    if draft_len < 1:
        yield Problem(f"draft_len is {draft_len}", "--draft-len", None, "draft at least one token")
    elif drafter.horizon is not None and draft_len > drafter.horizon:
        why = f"the drafter was trained for {drafter.horizon} ({drafter.horizon_source})"
        remedy = f"use at most {drafter.horizon}, or train a drafter for more"
        yield Problem(f"draft_len is {draft_len}", "--draft-len", why, remedy)
    elif draft_len > MAX_DRAFT_LEN:
        why = "memory for every drafted token is reserved up front"
        yield Problem(f"draft_len is {draft_len}", "--draft-len", why, f"use at most {MAX_DRAFT_LEN}")
