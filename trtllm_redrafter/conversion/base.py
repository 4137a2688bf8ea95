"""The base model of a conversion, from Hugging Face or from a checkpoint that NVIDIA's tools wrote.

Both become the same thing: a config for the wanted ranks, and for each rank the tensors and where their bytes come
from. An existing checkpoint (FP8, AWQ, ...) passes through byte for byte; only the drafter is added to it.

    base = open_base(options)
    base.config.tp_size, base.rank_tensors(0)["lm_head.weight"]

`tie_word_embeddings: true` means that the LM head is the embedding. Some files hold another, trained `lm_head.weight`
all the same: transformers 4 drops it, transformers 5 takes it. By default the config decides, and the conversion says
so; `--lm-head file` takes the trained one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from trtllm_redrafter.base_models.hf_model import HFModel, check_tensors, tensor_sources, weights_sample
from trtllm_redrafter.base_models.tokenizer import tokenizer_files, tokenizer_sha256
from trtllm_redrafter.base_models.tokenizer_setup import end_tokens, tokenizer_setup
from trtllm_redrafter.checkpoint.config import DTYPES, CheckpointConfig
from trtllm_redrafter.checkpoint.kinds import Kind, kind_of
from trtllm_redrafter.checkpoint.layout import DTYPE_NAMES, tensor_specs
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import EMBEDDING, LM_HEAD, QUANT_CFG, TOKENIZER_DIRECTORY, hf_names, rank_file
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.stored_tensor import StoredTensor
from trtllm_redrafter.checkpoint.structure import structure_problems
from trtllm_redrafter.conversion.options import AUTO_DTYPE, EMBEDDING_HEAD, FILE_HEAD, ConvertOptions
from trtllm_redrafter.conversion.sources import RankTensor, Source, copied, rank_tensor, row_count
from trtllm_redrafter.errors import InputError, MismatchError, Problem, limited, raise_together
from trtllm_redrafter.fsio import read_json

HF_EMBEDDING, HF_LM_HEAD = hf_names(EMBEDDING)[0], hf_names(LM_HEAD)[0]
_ROWS = 1024
"""Rows compared at a time."""


@dataclass(frozen=True)
class Base:
    """What both kinds of base offer. `rank_tensors` gives every base tensor of one rank, by name.

    `head` is the LM head, for drafters that borrow it; empty when it cannot be read as numbers. `eos_token_ids` are
    complete after `with_tokenizer`. `problems` are those of a readable base that does not fit the options.
    """

    path: Path
    kind: str
    config: CheckpointConfig
    files: tuple[Path, ...]
    copied: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    eos_token_ids: tuple[int, ...]
    notes: tuple[str, ...]
    head: tuple[Source, ...]
    rank_tensors: Callable[[int], dict[str, RankTensor]]
    problems: tuple[Problem, ...]
    weights_sample: str | None
    """See `base_models.hf_model.weights_sample`; None for a checkpoint as base."""

    @property
    def tokenizer_sha256(self) -> str | None:
        """The tokenizer's identity; None without tokenizer files."""
        return tokenizer_sha256(self.tokenizer[0].parent) if self.tokenizer else None


def open_base(options: ConvertOptions) -> Base:
    """Open `options.base`, whichever kind it is; `InputError` when it cannot be used."""
    path = options.base
    if not path.is_dir():
        what = "the base model is not a directory" if path.exists() else "the base model directory does not exist"
        raise InputError(what, where=path, remedy="check --base")
    if kind_of(read_json(path / "config.json")) is Kind.CHECKPOINT:
        return _from_checkpoint(options)
    model = HFModel.open(path)
    config, notes = chosen_head(model, options.lm_head)
    return _from_huggingface(model, options.applied_to(config), notes)


def with_tokenizer(base: Base) -> Base:
    """The base with its tokenizer checked and its end tokens known; `InputError` when the tokenizer is not usable."""
    folder = base.tokenizer[0].parent if base.tokenizer else base.path
    remedy = "download the base's tokenizer files again, or take them away and pass --tokenizer to build"
    text = tokenizer_setup(folder, vocab_size=base.config.vocab_size, remedy=remedy, recorded=base.eos_token_ids)
    return replace(base, eos_token_ids=text.end_token_ids, notes=(*base.notes, *text.notes))


def huggingface_rank(model: HFModel, config: CheckpointConfig, rank: int) -> dict[str, RankTensor]:
    """A Hugging Face model's tensors on one rank, split and cast as `config` says."""
    specs = tensor_specs(config)
    return {
        name: rank_tensor(specs[name], [model.tensors[source] for source in sources], config, rank)
        for name, sources in tensor_sources(config).items()
    }


def _from_huggingface(model: HFModel, config: CheckpointConfig, notes: tuple[str, ...]) -> Base:
    return Base(
        path=model.path,
        kind="huggingface",
        config=config,
        files=model.files,
        copied=(),
        tokenizer=tuple(tokenizer_files(model.path)),
        eos_token_ids=(),
        notes=(*model.notes, *_cast_notes(model, config), *notes),
        head=tuple(model.tensors[source] for source in tensor_sources(config)[LM_HEAD]),
        rank_tensors=partial(huggingface_rank, model, config),
        problems=(),
        weights_sample=weights_sample(model.tensors),
    )


def _cast_notes(model: HFModel, config: CheckpointConfig) -> list[str]:
    stored = sorted({tensor.dtype for tensor in model.tensors.values()})
    casts = stored != [DTYPE_NAMES[config.dtype]]
    return [f"weights stored as {', '.join(stored)} are cast to {config.dtype}"] if casts else []


def _from_checkpoint(options: ConvertOptions) -> Base:
    """An existing checkpoint: its ranks, dtype and embedding layout are given and must be what is asked for."""
    checkpoint = Checkpoint.open(options.base)
    config, path = checkpoint.config, options.base
    notes = [f"the base is a TensorRT-LLM checkpoint ({config.quant_algo or 'not quantized'}): its tensors are copied"]
    if config.use_parallel_embedding != options.parallel_embedding:
        held = "split over ranks" if config.use_parallel_embedding else "whole on every rank"
        notes.append(f"the embedding stays as it is in the base checkpoint: {held}")
    tokenizer = tuple(tokenizer_files(path / TOKENIZER_DIRECTORY) or tokenizer_files(path))
    return Base(
        path=path,
        kind="checkpoint",
        config=config,
        files=(path / "config.json", *(rank_file(path, r) for r in range(config.tp_size))),
        copied=tuple(p for p in (path / QUANT_CFG,) if p.is_file()),
        tokenizer=tokenizer,
        eos_token_ids=_recorded(checkpoint),
        notes=tuple(notes),
        head=checkpoint_head(checkpoint),
        rank_tensors=lambda rank: {name: copied(tensor) for name, tensor in checkpoint.ranks[rank].items()},
        problems=tuple(_checkpoint_problems(checkpoint, options)),
        weights_sample=None,
    )


def _recorded(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End tokens that an earlier conversion kept."""
    found = () if checkpoint.manifest is None else checkpoint.manifest.end_tokens
    return end_tokens(None, None, vocab_size=checkpoint.config.vocab_size, recorded=found).ids


def _checkpoint_problems(checkpoint: Checkpoint, options: ConvertOptions) -> list[Problem]:
    config, where = checkpoint.config, str(options.base)
    problems = []
    if config.drafter is not None:
        remedy = "pass the checkpoint without a drafter"
        problems.append(Problem("the base checkpoint has a drafter already", where, None, remedy))
    if options.tp_size != config.tp_size:
        why = "a checkpoint is already split over ranks, and is not split again"
        remedy = f"pass --tp-size {config.tp_size}, or export the base again"
        what = f"the base checkpoint has {config.tp_size} tensor-parallel rank(s), {options.tp_size} are asked for"
        problems.append(Problem(what, where, why, remedy))
    if options.dtype not in (AUTO_DTYPE, config.dtype) and options.dtype in DTYPES:
        remedy = "pass --dtype auto, or export the base again"
        what = f"the base checkpoint is {config.dtype}, {options.dtype} is asked for"
        problems.append(Problem(what, where, "its tensors are copied as they are", remedy))
    return problems + limited(structure_problems(checkpoint))


def checkpoint_head(checkpoint: Checkpoint) -> tuple[Source, ...]:
    """The LM head, one part per rank; empty when it cannot be read as numbers."""
    config = checkpoint.config
    has_head = LM_HEAD in checkpoint.ranks[0]
    name = LM_HEAD if has_head else EMBEDDING
    is_split = has_head or config.use_parallel_embedding
    ranks = checkpoint.ranks if is_split else checkpoint.ranks[:1]
    parts = [file[name] for file in ranks if name in file]
    is_head = all(part.dtype in DTYPE_NAMES.values() and part.shape[1:] == (config.hidden_size,) for part in parts)
    complete = len(parts) == len(ranks) and is_head and row_count(parts) == config.vocab_size
    return tuple(parts) if complete else ()


def chosen_head(model: HFModel, choice: str) -> tuple[CheckpointConfig, tuple[str, ...]]:
    """The model's config with the chosen head, and notes."""
    config = model.config
    if choice == FILE_HEAD and config.tie_word_embeddings:
        config = replace(config, tie_word_embeddings=False)
        raise_together(InputError, check_tensors(config, model.tensors, model.path), "the file has no such LM head",
                       where=model.path, remedy="leave --lm-head out")  # fmt: skip
        return config, (f"the LM head is the file's {HF_LM_HEAD}, although config.json ties it to the embedding",)
    if choice == EMBEDDING_HEAD and not config.tie_word_embeddings:
        why = "tie_word_embeddings is not true in its config.json"
        what = "the model's LM head is not its embedding"
        raise MismatchError(what, where="--lm-head embedding", why=why, remedy="leave --lm-head out")
    stored = model.tensors.get(HF_LM_HEAD)
    if choice == EMBEDDING_HEAD or not config.tie_word_embeddings or stored is None:
        return config, ()
    if _same(model.tensors[HF_EMBEDDING], stored):
        return config, ()
    return config, (
        f"config.json ties the LM head to the embedding, but the file has another {HF_LM_HEAD}: the embedding is used, "
        "as in transformers 4; pass --lm-head file for the file's (transformers 5 takes it; train and evaluate do "
        "when tie_word_embeddings is false), or --lm-head embedding to confirm",
    )


def takes_file_head(manifest: Manifest | None) -> bool:
    """Was this checkpoint converted with `--lm-head file`?"""
    return manifest is not None and manifest.options.get("lm_head") == FILE_HEAD


def _same(embedding: StoredTensor, head: StoredTensor) -> bool:
    if embedding.shape != head.shape:
        return False
    rows = embedding.shape[0]
    for start in range(0, rows, _ROWS):
        a, b = (each.read(start, min(start + _ROWS, rows)) for each in (embedding, head))
        if not torch.equal(a.to(torch.float32), b.to(torch.float32)):
            return False
    return True
