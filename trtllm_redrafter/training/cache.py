"""Hidden states on disk, computed once: epochs and variants never run the base model again.

A directory with three plain arrays, one row per learnt token, and a manifest with their hashes:

    hidden.bin    [N, H] in the base model's dtype     tokens.bin [N] int32     document.bin [N] int32

Soft targets need no space of their own: the base's whole distribution is its head times the cached state. A cache is
used only if it was made from these texts by this model and every byte is as it was written; otherwise it is made again,
and the reason is reported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.weights import DTYPES
from trtllm_redrafter.errors import InputError, OutputError
from trtllm_redrafter.fsio import as_output_error, read_json, sha256_file, write_json
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.scratch import remove_tree
from trtllm_redrafter.training.data import TokenizedText
from trtllm_redrafter.training.drafter_files import BaseIdentity
from trtllm_redrafter.training.frozen_base import FrozenBase
from trtllm_redrafter.training.rows import TrainingRows

MANIFEST = "manifest.json"
FORMAT = 1
ARRAYS = ("hidden.bin", "tokens.bin", "document.bin")


@dataclass(frozen=True)
class CachePlan:
    """What a cache will hold and how large it will be; known from the texts alone."""

    rows: int
    documents: int
    hidden_size: int
    dtype: str
    forward_tokens: int

    @property
    def file_bytes(self) -> dict[str, int]:
        width = DTYPES[self.dtype].itemsize
        return dict(zip(ARRAYS, (self.rows * self.hidden_size * width, 4 * self.rows, 4 * self.rows), strict=True))

    @property
    def total_bytes(self) -> int:
        return sum(self.file_bytes.values())


def plan_cache(texts: Sequence[TokenizedText], hidden_size: int, dtype: str) -> CachePlan:
    return CachePlan(
        rows=sum(text.rows for text in texts),
        documents=sum(len(text.spans) for text in texts),
        hidden_size=hidden_size,
        dtype=dtype,
        forward_tokens=sum(len(text.token_ids) for text in texts),
    )


@dataclass(frozen=True)
class Cache:
    """Rows mapped from disk; `made` says why they had to be computed, None if they were there."""

    rows: TrainingRows
    made: str | None


def cache_key(texts: Sequence[TokenizedText], identity: BaseIdentity, weights: str, dtype: str) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(identity), weights, dtype]).encode())
    for text in texts:
        digest.update(json.dumps([text.token_ids, text.spans]).encode())
    return digest.hexdigest()


def weights_fingerprint(base: Path) -> str:
    """Names, sizes and times of the model's weight files: enough to notice another model in the same place."""
    files = sorted(p for p in base.iterdir() if p.suffix in (".safetensors", ".bin"))
    return json.dumps([[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files])


def open_or_build(
    folder: Path,
    texts: Sequence[TokenizedText],
    base: FrozenBase,
    plan: CachePlan,
    key: str,
    *,
    batch_tokens: int,
    progress: Progress,
) -> Cache:
    """The cache in `folder`, made now if it is missing, of other texts, or damaged."""
    reason = what_is_wrong(folder, plan, key)
    if reason is not None:
        _build(folder, texts, base, plan, key, batch_tokens, progress)
    return Cache(_map(folder, plan, shared=False), reason)


def what_is_wrong(folder: Path, plan: CachePlan, key: str) -> str | None:
    """Why this cache cannot be used; None if it can."""
    if not (folder / MANIFEST).exists():
        return "there is none" if not folder.exists() else "it was not finished"
    try:
        manifest = read_json(folder / MANIFEST)
        files: dict[str, Any] = manifest["files"]
        if manifest["key"] != key:
            return "it was made from other texts, or by another model"
        for name, size in plan.file_bytes.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if sha256_file(folder / name) != files[name]:
                return f"{name} is damaged: its hash has changed"
    except (InputError, OSError, KeyError, TypeError) as error:
        return f"it is damaged: {error}"
    return None


def check_space(folder: Path, plan: CachePlan) -> None:
    """Refuse before the first byte when the disk cannot hold the cache."""
    place = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if plan.total_bytes > free:
        raise OutputError(
            "the disk cannot hold the hidden states",
            where=folder,
            why=f"{plan.total_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            remedy="use fewer texts, or a work directory on another disk",
        )


def _build(
    folder: Path,
    texts: Sequence[TokenizedText],
    base: FrozenBase,
    plan: CachePlan,
    key: str,
    batch_tokens: int,
    progress: Progress,
) -> None:
    with as_output_error(folder):
        remove_tree(folder)
        check_space(folder, plan)
        folder.mkdir(parents=True)
        rows = _map(folder, plan, shared=True)
        _fill(rows, texts, base, batch_tokens, progress)
        del rows  # the mapping must be gone before the files are hashed
        hashes = {name: sha256_file(folder / name) for name in ARRAYS}
        write_json(folder / MANIFEST, {"format": FORMAT, "key": key, "plan": asdict(plan), "files": hashes})


def rows_in_memory(
    texts: Sequence[TokenizedText], base: FrozenBase, batch_tokens: int, progress: Progress
) -> TrainingRows:
    """The rows of a few texts in their order, without a cache."""
    count, hidden_size = sum(text.rows for text in texts), base.head.shape[1]
    rows = TrainingRows(
        torch.empty(count, hidden_size, dtype=base.head.dtype),
        torch.empty(count, dtype=torch.int32),
        torch.empty(count, dtype=torch.int32),
    )
    _fill(rows, texts, base, batch_tokens, progress)
    return rows


def _fill(
    rows: TrainingRows, texts: Sequence[TokenizedText], base: FrozenBase, batch_tokens: int, progress: Progress
) -> None:
    """Run the base over texts of similar length together; each text's rows go to their own place."""
    first_row, first_document, row, document = [], [], 0, 0
    for text in texts:
        first_row.append(row)
        first_document.append(document)
        row, document = row + text.rows, document + len(text.spans)
    done = 0
    for members in _batches(texts, batch_tokens):
        for i, states in zip(members, base.hidden([texts[i].token_ids for i in members]), strict=True):
            at = first_row[i]
            for number, (start, end) in enumerate(texts[i].spans):
                place = slice(at, at + end - start)
                rows.hidden[place] = states[start - 1 : end - 1].to("cpu", rows.hidden.dtype)
                rows.tokens[place] = torch.tensor(texts[i].token_ids[start:end], dtype=torch.int32)
                rows.document[place] = first_document[i] + number
                at += end - start
            done += len(texts[i].token_ids)
        progress("hidden states", done, sum(len(t.token_ids) for t in texts), "tokens")


def _batches(texts: Sequence[TokenizedText], batch_tokens: int) -> list[list[int]]:
    """Text numbers in groups of at most `batch_tokens` padded tokens (one text alone may have more)."""
    groups: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i].token_ids)):
        if groups and (len(groups[-1]) + 1) * len(texts[i].token_ids) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _map(folder: Path, plan: CachePlan, *, shared: bool) -> TrainingRows:
    """The three arrays as memory-mapped tensors; `shared` ones are created and written through."""

    def array(name: str, count: int, dtype: torch.dtype) -> Tensor:
        if count == 0:
            (folder / name).touch()
            return torch.empty(0, dtype=dtype)
        return torch.from_file(str(folder / name), shared=shared, size=count, dtype=dtype)

    hidden, tokens, document = ARRAYS
    return TrainingRows(
        array(hidden, plan.rows * plan.hidden_size, DTYPES[plan.dtype]).view(plan.rows, plan.hidden_size),
        array(tokens, plan.rows, torch.int32),
        array(document, plan.rows, torch.int32),
    )
