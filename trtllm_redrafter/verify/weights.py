"""Compare a checkpoint or engine with what it was made from, bit for bit.

Against a Hugging Face model, the conversion is planned again with the checkpoint's own settings and produced block by
block, but compared with the files instead of written. This covers splits, padding, repeated KV heads and casts on every
rank. A drafter's directory is compared in the same way. Against another checkpoint, tensors are compared as stored. A
TensorRT-LLM engine has no tensor files: only its config's fields can be compared.

    report = verify(Path("checkpoint"), against=Path("Llama-3.1-8B"), hashes=True, progress=no_progress)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from trtllm_redrafter.base_models.hf_model import HFModel
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.kinds import COMPILED, Kind, kind_at
from trtllm_redrafter.checkpoint.names import DRAFTER
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile
from trtllm_redrafter.checkpoint.stored_tensor import StoredTensor, tensor_bytes
from trtllm_redrafter.conversion.base import checkpoint_head, huggingface_rank, takes_file_head
from trtllm_redrafter.conversion.drafter import DrafterFiles
from trtllm_redrafter.conversion.sources import RankTensor, blocks, copied, rank_tensor
from trtllm_redrafter.errors import MismatchError, Problem, RedrafterError, limited, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.verify.files import VerifyReport, checkpoint_directory, verify_files

CHUNK_BYTES = 2**20

COMPARED_FIELDS = (
    "base_architecture", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_size", "vocab_size", "norm_epsilon", "hidden_act", "max_position_embeddings",
    "rotary_base", "rotary_scaling", "attn_bias", "mlp_bias",
)  # fmt: skip
"""Config fields that must be equal in checkpoint and model."""


def verify(
    path: Path, *, against: Path | None, hashes: bool, progress: Progress, drafter: Path | None = None
) -> VerifyReport:
    """Check files against manifest and layout, and values against a base model or checkpoint and a drafter."""
    other = None if against is None else _open_other(against)
    report = verify_files(path, hashes=hashes)
    if not report.ok:
        return report
    if other is None and drafter is None:
        report.notes.append(_not_compared(path))
        return report
    try:
        if kind_at(path) in COMPILED:
            _compare_compiled(report, other)
            return report
        checkpoint = Checkpoint.open(checkpoint_directory(path))
        if other is not None:
            _compare_base(report, checkpoint, other, progress)
        if report.ok and checkpoint.config.drafter is not None:
            _compare_drafter(report, checkpoint, drafter, other)
        elif drafter is not None and checkpoint.config.drafter is None:
            report.problems.append(Problem("there is no drafter here", str(path), None, "leave --drafter out"))
    except RedrafterError as e:
        report.problems += e.problems or (e.problem,)
    report.problems = limited(report.problems)
    return report


def _open_other(against: Path) -> HFModel | Checkpoint:
    return Checkpoint.open(against) if kind_at(against) is Kind.CHECKPOINT else HFModel.open(against)


def _not_compared(path: Path) -> str:
    if kind_at(path) in COMPILED:
        return "what it computes was not compared: --reference CHECKPOINT runs it, --against MODEL compares its config"
    return "values were not compared: --against BASE and --drafter DIR do that bit for bit"


def _compare_compiled(report: VerifyReport, other: HFModel | Checkpoint | None) -> None:
    where_they_are = "compiled into the engine" if kind_at(report.path) is Kind.TENSORRT_ENGINE else "not in the engine"
    report.notes.append(
        f"the weights are {where_they_are} and not compared: verify its checkpoint, and use --reference"
    )
    if other is not None:
        where = checkpoint_directory(report.path) / "config.json"
        values = read_json(where)
        config = CheckpointConfig.from_dict(values.get("pretrained_config", values), where=where)
        report.problems += _config_problems(config, other.config, report.path)
        report.checks.append(f"{len(COMPARED_FIELDS)} fields of the engine's config against {other.path}")


def _compare_base(
    report: VerifyReport, checkpoint: Checkpoint, other: HFModel | Checkpoint, progress: Progress
) -> None:  # fmt: skip
    report.problems += _config_problems(checkpoint.config, other.config, report.path)
    if not report.ok:
        return
    if isinstance(other, Checkpoint):
        count, problems = compare_checkpoints(checkpoint.path, other.path, progress)
    elif checkpoint.config.quant_algo is not None:
        report.notes.append(f"values are not compared: the checkpoint is quantized as {checkpoint.config.quant_algo}")
        return
    else:
        count, problems = _compare(checkpoint, other, progress)
    report.problems += problems
    ranks = len(checkpoint.ranks)
    report.checks.append(f"values of {count} tensors on {ranks} rank(s), bit for bit, against {other.path}")


def _compare_drafter(
    report: VerifyReport, checkpoint: Checkpoint, folder: Path | None, other: HFModel | Checkpoint | None
) -> None:  # fmt: skip
    """The drafter's tensors as `convert` writes them; a tied head is the checkpoint's own LM head."""
    if folder is None:
        note = "the drafter's values are not in the base model: --drafter DIR compares them, else the hashes alone do"
        report.notes += [] if isinstance(other, Checkpoint) else [note]  # a checkpoint has been compared as a whole
        return
    drafter = DrafterFiles.open(folder)
    raise_together(MismatchError, drafter.problems, "the drafter cannot be compared", where=folder)
    if drafter.config != checkpoint.config.drafter:
        what = f"the drafter's sizes are {checkpoint.config.drafter}, {folder} has {drafter.config}"
        report.problems.append(Problem(what, str(report.path), None, "name the drafter it was made from"))
        return
    sources = drafter.sources(checkpoint_head(checkpoint))
    for rank, file in enumerate(checkpoint.ranks):
        for name, parts in sources.items():
            expected = rank_tensor(checkpoint.specs[DRAFTER + name], parts, checkpoint.config, rank)
            if not all(_same(expected, file[DRAFTER + name])):
                what = f"tensor {DRAFTER + name!r} differs from the drafter's"
                report.problems.append(Problem(what, str(file.path), f"{folder} has other values", "convert again"))
    ranks = len(checkpoint.ranks)
    report.checks.append(f"values of {len(sources)} drafter tensors on {ranks} rank(s), bit for bit, against {folder}")


def _config_problems(config: CheckpointConfig, expected: CheckpointConfig, path: Path) -> list[Problem]:
    remedy = "compare with the model the checkpoint was made from"
    return [
        Problem(f"{name} is {ours!r}, the model's is {theirs!r}", str(path), None, remedy)
        for name in COMPARED_FIELDS
        if (ours := getattr(config, name)) != (theirs := getattr(expected, name))
    ]


def _compare(checkpoint: Checkpoint, model: HFModel, progress: Progress) -> tuple[int, list[Problem]]:
    """Number of tensors compared, and a problem for each that differs."""
    config = checkpoint.config
    ties = model.config.tie_word_embeddings and not takes_file_head(checkpoint.manifest)
    base = replace(config, tie_word_embeddings=ties, drafter=None, quantization={})
    total = sum(file.size for file in checkpoint.ranks)
    done = count = 0
    problems = []
    for rank, file in enumerate(checkpoint.ranks):
        for name, expected in huggingface_rank(model, base, rank).items():
            found = file.get(name)
            if found is None:  # a tied LM head that is left out
                continue
            if not all(_same(expected, found)):
                what, why = f"tensor {name!r} differs from the model", "the values are not those of a conversion"
                problems.append(Problem(what, str(file.path), why, "convert again"))
            count, done = count + 1, done + found.nbytes
            progress("compare", done, total, "bytes")
        drafter = sum(t.nbytes for name, t in file.items() if name.startswith(DRAFTER))
        done += drafter + file.size - sum(t.nbytes for t in file.values())
    progress("compare", total, total, "bytes")
    return count, problems


def compare_checkpoints(found: Path, expected: Path, progress: Progress) -> tuple[int, list[Problem]]:
    """Compare all tensors of two checkpoints, the drafter's included, bit for bit: how many, and the differences."""
    ours, theirs = Checkpoint.open(found), Checkpoint.open(expected)
    if len(ours.ranks) != len(theirs.ranks):
        what = f"there are {len(ours.ranks)} ranks, the other checkpoint has {len(theirs.ranks)}"
        return 0, [Problem(what, str(found), None, "compare with the checkpoint it was made from")]
    count, problems = 0, list[Problem]()
    for rank, other in zip(ours.ranks, theirs.ranks, strict=True):
        progress("compare", count, sum(len(r) for r in ours.ranks), "tensors")
        problems += _rank_differences(rank, other)
        count += len(rank)
    return count, limited(problems)


def _rank_differences(rank: SafetensorsFile, other: SafetensorsFile) -> Iterator[Problem]:
    if rank.path.samefile(other.path):  # a link, as in engines where the file system allows it
        return
    for name in sorted({*rank, *other}):
        found, expected = rank.get(name), other.get(name)
        if found is None or expected is None:
            yield Problem(f"only one of the two has the tensor {name!r}", str(rank.path), None, "build it again")
        elif (found.dtype, found.shape) != (expected.dtype, expected.shape):
            why = f"{found.dtype} {list(found.shape)} and {expected.dtype} {list(expected.shape)}"
            yield Problem(f"tensor {name!r} has another dtype or shape", str(rank.path), why, "build it again")
        elif not all(_same(copied(expected), found)):
            what = f"tensor {name!r} differs from the checkpoint's"
            yield Problem(what, str(rank.path), f"{other.path} has other values", "build it again from the checkpoint")


def _same(expected: RankTensor, found: StoredTensor) -> Iterator[bool]:
    """For each chunk of the planned tensor: are the file's bytes the same?"""
    at = 0
    for block in blocks(expected):
        if isinstance(block, StoredTensor):
            for begin in range(0, block.nbytes, CHUNK_BYTES):
                chunk = memoryview(bytearray(min(CHUNK_BYTES, block.nbytes - begin)))
                block.read_into(chunk, begin)
                yield _bytes_equal(chunk, found, at)
                at += len(chunk)
        else:
            data = tensor_bytes(block)
            yield _bytes_equal(data, found, at)
            at += len(data)
    yield at == found.nbytes


def _bytes_equal(expected: memoryview, tensor: StoredTensor, offset: int) -> bool:
    found = bytearray(len(expected))
    tensor.read_into(memoryview(found), offset)
    return found == expected
