"""Do a checkpoint's tensors fit its config.json? The same checks for `build`, loading and `verify`.

TensorRT-LLM's loader only logs a wrong dtype, ignores extra tensors and does not notice a missing drafter LM head; a
build then fails hours later, or never. Only headers are read, and with several ranks a few pages of each tensor:

A rank file that was copied twice, or comes from another conversion, has the right names, shapes and dtypes, and results
in an engine that generates nonsense. So some values are compared:

    replicated vectors (norms, biases)  equal on all ranks
    split tensors                       not all equal between two ranks
    KV heads repeated on ranks          equal on the ranks that share them
    padding of the vocabulary           zero, below the last rank's rows
    a tied LM head                      rank r's part of the embedding

Without `manifest.json`, two ranks that were swapped as a whole are recognised by a tied head only. `verify` also reads
all weights and checks that they are finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trtllm_redrafter.checkpoint.layout import DTYPE_NAMES, Split, TensorSpec, divisibility_problems, rank_slice
from trtllm_redrafter.checkpoint.names import DRAFTER, EMBEDDING, LM_HEAD
from trtllm_redrafter.checkpoint.quantization import DRAFTER_EXCLUDE, is_excluded
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.stored_tensor import StoredTensor, non_finite_count
from trtllm_redrafter.errors import InputError, Problem, limited, raise_together

REMEDY = "convert again, or restore the file from an intact copy"
_RANK_REMEDY = "convert again, or copy the rank files from an intact checkpoint"

SAMPLES = 16
SAMPLE_BYTES = 4096
"""Pages sampled per tensor, evenly spaced; a smaller tensor is read whole."""


def require_sound(checkpoint: Checkpoint) -> None:
    """`InputError` for all that `verify` finds without reading the weights; called first by `build` and `load`."""
    problems = limited(structure_problems(checkpoint))
    what = "the checkpoint's files do not fit its config.json"
    raise_together(InputError, problems, what, where=checkpoint.path, remedy=REMEDY)


def structure_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Everything in the files that contradicts config.json, and signs that rank files were mixed up.

    Reads headers, and with several ranks a few pages of each tensor.
    """
    config = checkpoint.config
    problems = divisibility_problems(config, str(checkpoint.path))
    if problems:
        return problems
    for rank in range(len(checkpoint.ranks)):
        problems += _rank_problems(checkpoint, rank)
        problems += _surplus_problems(checkpoint, rank)
    problems += () if problems else rank_problems(checkpoint)
    excludes = config.quantization.get("exclude_modules")
    if config.drafter is not None and config.quant_algo is not None and not is_excluded("drafter.input_proj", excludes):
        why = "TensorRT-LLM would build the drafter's 16-bit layers as quantized ones"
        remedy = f"add {DRAFTER_EXCLUDE!r} to quantization.exclude_modules in config.json"
        problems.append(Problem("the drafter is not excluded from quantization", str(checkpoint.path), why, remedy))
    return problems


def _rank_problems(checkpoint: Checkpoint, rank: int) -> Iterator[Problem]:
    file = checkpoint.ranks[rank]
    where = str(file.path)
    for name, spec in checkpoint.specs.items():
        info = file.get(name)
        if info is None:
            if not spec.optional:
                why = "TensorRT-LLM's loader does not notice" if name.endswith("." + LM_HEAD) else None
                yield Problem(f"tensor {name!r} is missing", where, why, REMEDY)
        elif spec.checked:
            expected = rank_slice(spec, checkpoint.config, rank).shape(spec.shape)
            yield from _tensor_problems(info, spec.dtype, expected, where)
        elif info.dtype not in (*DTYPE_NAMES.values(), "I8", "U8", "F8_E4M3"):
            yield Problem(f"tensor {name!r} has the dtype {info.dtype}", where, None, REMEDY)


def _surplus_problems(checkpoint: Checkpoint, rank: int) -> Iterator[Problem]:
    file = checkpoint.ranks[rank]
    where = str(file.path)
    if all(spec.checked for spec in checkpoint.specs.values()):
        for name in sorted(set(file) - set(checkpoint.specs)):
            why = "TensorRT-LLM would ignore it"
            yield Problem(f"tensor {name!r} does not belong into this checkpoint", where, why, REMEDY)


def _tensor_problems(info: StoredTensor, dtype: str, shape: tuple[int, ...], where: str) -> Iterator[Problem]:
    fp8_as_int8 = dtype == "F8_E4M3" and info.dtype == "I8"
    if info.dtype != dtype and not fp8_as_int8:
        why = f"it is {info.dtype}, config.json implies {dtype}; TensorRT-LLM only logs this and fails later"
        yield Problem(f"tensor {info.name!r} has the wrong dtype", where, why, REMEDY)
    if info.shape != shape:
        why = f"it is {list(info.shape)}, config.json implies {list(shape)}"
        yield Problem(f"tensor {info.name!r} has the wrong shape", where, why, REMEDY)


def rank_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Signs that a rank file is another rank's, or of another checkpoint; none for a single rank.

    Names, shapes and dtypes must have been checked before.
    """
    ranks = checkpoint.ranks
    if len(ranks) == 1:
        return
    specs = [spec for spec in checkpoint.specs.values() if all(spec.name in file for file in ranks)]
    yield from _replicated(checkpoint, [s for s in specs if s.split is Split.COPY and len(s.shape) < 2])
    yield from _doubled(checkpoint, [spec for spec in specs if spec.split is not Split.COPY])
    for spec in specs:
        if spec.split is Split.QKV and spec.checked:
            yield from _shared_heads(checkpoint, spec)
        if spec.split is Split.VOCAB and spec.checked:
            yield from _padding(checkpoint, spec)
    yield from _tied_head(checkpoint)


def _replicated(checkpoint: Checkpoint, specs: list[TensorSpec]) -> Iterator[Problem]:
    first = checkpoint.ranks[0]
    for spec in specs:
        expected = _sample(first[spec.name])
        for file in checkpoint.ranks[1:]:
            if _sample(file[spec.name]) != expected:
                what = f"tensor {spec.name!r} is not the same as in {first.path.name}"
                why = "every rank holds a copy of it: the files are of different checkpoints"
                yield Problem(what, str(file.path), why, _RANK_REMEDY)


def _doubled(checkpoint: Checkpoint, specs: list[TensorSpec]) -> Iterator[Problem]:
    """Two ranks with the same parts of all split tensors. Constant tensors (all zeros) say nothing about it."""
    seen: dict[tuple[bytes, ...], Path] = {}
    for file in checkpoint.ranks:
        parts = tuple(_sample(file[spec.name]) for spec in specs)
        if not any(len(set(part)) > 4 for part in parts):
            return
        if parts in seen:
            what = f"the file holds the same part of every tensor as {seen[parts].name}"
            yield Problem(what, str(file.path), "every rank has a different part", _RANK_REMEDY)
        seen.setdefault(parts, file.path)


def _shared_heads(checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[Problem]:
    """With fewer KV heads than ranks, consecutive ranks must have the same key and value rows."""
    config = checkpoint.config
    repeats = config.tp_size // config.num_key_value_heads
    if repeats <= 1:
        return
    for rank, file in enumerate(checkpoint.ranks):
        leader = checkpoint.ranks[rank - rank % repeats]
        rows = 2 * spec.shape[0] // (config.num_attention_heads + 2 * config.num_key_value_heads)
        ends = []
        for each in (leader, file):
            stored = each[spec.name]
            ends.append(_sample(stored.rows(stored.shape[0] - rows, stored.shape[0])))
        if ends[0] != ends[1]:
            what = f"tensor {spec.name!r} does not share its KV head with {leader.path.name}"
            why = f"{config.num_key_value_heads} KV heads on {config.tp_size} ranks are repeated on consecutive ranks"
            yield Problem(what, str(file.path), why, _RANK_REMEDY)


def _padding(checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[Problem]:
    for rank, file in enumerate(checkpoint.ranks):
        zero_rows = rank_slice(spec, checkpoint.config, rank).zero_rows
        stored = file[spec.name]
        if zero_rows and any(_sample(stored.rows(stored.shape[0] - zero_rows, stored.shape[0]))):
            what = f"tensor {spec.name!r} has values where the vocabulary's padding should be"
            yield Problem(what, str(file.path), "the file is another rank's, or of another checkpoint", _RANK_REMEDY)


def _tied_head(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A tied LM head whose parts are on the wrong ranks."""
    head, embedding = checkpoint.specs.get(LM_HEAD), checkpoint.specs[EMBEDDING]
    first = checkpoint.ranks[0]
    whole = embedding.split is Split.COPY and LM_HEAD in first and EMBEDDING in first
    if head is None or not whole or not head.checked or first[LM_HEAD].dtype != first[EMBEDDING].dtype:
        return
    rows = [rank_slice(head, checkpoint.config, rank).rows[0] for rank in range(len(checkpoint.ranks))]
    expected = [_sample(first[EMBEDDING].rows(start, stop)) for start, stop in rows]
    for rank, (file, (start, stop)) in enumerate(zip(checkpoint.ranks, rows, strict=True)):
        found = _sample(file[LM_HEAD].rows(0, stop - start))
        if found != expected[rank] and found in expected:
            what = f"{LM_HEAD!r} is the part of rank {expected.index(found)}, not of rank {rank}"
            yield Problem(what, str(file.path), "rank files have been exchanged", _RANK_REMEDY)


def _sample(tensor: StoredTensor) -> bytes:
    """Evenly spaced pages of a tensor, or all of it if that is less."""
    if tensor.nbytes <= SAMPLES * SAMPLE_BYTES:
        places = [(0, tensor.nbytes)]
    else:
        step = (tensor.nbytes - SAMPLE_BYTES) / (SAMPLES - 1)
        places = [(int(i * step), SAMPLE_BYTES) for i in range(SAMPLES)]
    parts = [bytearray(count) for _, count in places]
    for part, (offset, _) in zip(parts, places, strict=True):
        tensor.read_into(memoryview(part), offset)
    return b"".join(parts)


def finite_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A problem for every stored tensor with values that are not finite: one alone makes every output meaningless.

    Reads all weights, in chunks.
    """
    for file in checkpoint.ranks:
        for name, tensor in file.items():
            count = non_finite_count(tensor.load())
            if count:
                role = "drafter" if name.startswith(DRAFTER) else "base model"
                what = f"tensor {name!r} has {count} value(s) that are not finite (NaN or infinite)"
                yield Problem(what, str(file.path), f"the {role} it was made from has them, or the file is damaged",
                              f"use an intact {role} and convert again")  # fmt: skip
