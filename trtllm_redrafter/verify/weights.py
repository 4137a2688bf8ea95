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
from trtllm_redrafter.checkpoint.layout import DRAFTER
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile, TensorInfo, tensor_bytes
from trtllm_redrafter.conversion.base import checkpoint_head, from_huggingface
from trtllm_redrafter.conversion.drafter_files import DrafterFiles
from trtllm_redrafter.conversion.head import takes_file_head
from trtllm_redrafter.conversion.plan import drafter_sources
from trtllm_redrafter.conversion.shards import Extent, TensorPlan, blocks, plan_tensor, whole
from trtllm_redrafter.conversion.sources import FileSource, OpenFiles
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
        return replace(report, notes=(*report.notes, _not_compared(path)))
    files = OpenFiles()
    try:
        if is_compiled(path):
            return _compare_compiled(report, other)
        checkpoint = Checkpoint.open(checkpoint_directory(path))
        if other is not None:
            report = _compare_base(report, checkpoint, other, files, progress)
        if report.ok and checkpoint.config.drafter is not None:
            report = _compare_drafter(report, checkpoint, drafter, other, files)
        elif drafter is not None and checkpoint.config.drafter is None:
            problem = Problem("there is no drafter here", str(path), None, "leave --drafter out")
            report = replace(report, problems=(*report.problems, problem))
    except RedrafterError as e:
        return replace(report, problems=tuple(e.problems or (e.problem,)))
    finally:
        files.close()
    return replace(report, problems=tuple(limited(list(report.problems))))


def _open_other(against: Path) -> HFModel | Checkpoint:
    return Checkpoint.open(against) if is_checkpoint(against) else HFModel.open(against)


def is_checkpoint(path: Path) -> bool:
    """Is this a TensorRT-LLM checkpoint, and not a Hugging Face model?"""
    config = path / "config.json"
    return config.is_file() and "architecture" in read_json(config)


def is_compiled(path: Path) -> bool:
    """Is this a TensorRT-LLM engine, whose weights are inside its compiled plans?"""
    return "pretrained_config" in read_json(path / "config.json")


def _not_compared(path: Path) -> str:
    if is_compiled(path):
        return "what it computes was not compared: --reference CHECKPOINT runs it, --against MODEL compares its config"
    return "values were not compared: --against BASE and --drafter DIR do that bit for bit"


def _compare_compiled(report: VerifyReport, other: HFModel | Checkpoint | None) -> VerifyReport:
    note = "the weights are compiled into the engine and not compared: verify its checkpoint, and use --reference"
    if other is None:
        return replace(report, notes=(*report.notes, note))
    where = report.path / "config.json"
    config = CheckpointConfig.from_dict(read_json(where)["pretrained_config"], where=where)
    problems = _config_problems(config, other.config, report.path)
    checks = (*report.checks, f"{len(COMPARED_FIELDS)} fields of the engine's config against {other.path}")
    return replace(report, checks=checks, problems=tuple(problems), notes=(*report.notes, note))


def _compare_base(
    report: VerifyReport, checkpoint: Checkpoint, other: HFModel | Checkpoint, files: OpenFiles, progress: Progress
) -> VerifyReport:
    problems = _config_problems(checkpoint.config, other.config, report.path)
    if problems:
        return replace(report, problems=tuple(problems))
    if isinstance(other, Checkpoint):
        count, problems = compare_checkpoints(checkpoint.path, other.path, progress)
    elif checkpoint.config.quant_algo is not None:
        note = f"values are not compared: the checkpoint is quantized as {checkpoint.config.quant_algo}"
        return replace(report, notes=(*report.notes, note))
    else:
        count, problems = _compare(checkpoint, other, files, progress)
    check = f"values of {count} tensors on {len(checkpoint.ranks)} rank(s), bit for bit, against {other.path}"
    return replace(report, checks=(*report.checks, check), problems=tuple(problems))


def _compare_drafter(
    report: VerifyReport, checkpoint: Checkpoint, folder: Path | None, other: HFModel | Checkpoint | None,
    files: OpenFiles,
) -> VerifyReport:  # fmt: skip
    """The drafter's tensors as `convert` writes them; a tied head is the checkpoint's own LM head."""
    if folder is None:
        if isinstance(other, Checkpoint):
            return report  # compared with the rest
        note = "the drafter's values are not in the base model: --drafter DIR compares them, else the hashes alone do"
        return replace(report, notes=(*report.notes, note))
    drafter = DrafterFiles.open(folder, files)
    raise_together(MismatchError, drafter.problems, "the drafter cannot be compared", where=folder)
    if drafter.config != checkpoint.config.drafter:
        what = f"the drafter's sizes are {checkpoint.config.drafter}, {folder} has {drafter.config}"
        return replace(report, problems=(Problem(what, str(report.path), None, "name the drafter it was made from"),))
    sources = drafter_sources(drafter, checkpoint_head(checkpoint, files))
    problems = []
    for rank, file in enumerate(checkpoint.ranks):
        for name, source in sources.items():
            plan = plan_tensor(checkpoint.specs[DRAFTER + name], source, checkpoint.config, rank)
            if not all(_same(plan, file, file.header[DRAFTER + name], files)):
                what = f"tensor {DRAFTER + name!r} differs from the drafter's"
                problems.append(Problem(what, str(file.path), f"{folder} has other values", "convert again"))
    check = (
        f"values of {len(sources)} drafter tensors on {len(checkpoint.ranks)} rank(s), bit for bit, against {folder}"
    )
    return replace(report, checks=(*report.checks, check), problems=tuple(problems))


def _config_problems(config: CheckpointConfig, expected: CheckpointConfig, path: Path) -> list[Problem]:
    remedy = "compare with the model the checkpoint was made from"
    return [
        Problem(f"{name} is {ours!r}, the model's is {theirs!r}", str(path), None, remedy)
        for name in COMPARED_FIELDS
        if (ours := getattr(config, name)) != (theirs := getattr(expected, name))
    ]


def _compare(checkpoint: Checkpoint, model: HFModel, files: OpenFiles, progress: Progress) -> tuple[int, list[Problem]]:
    """Number of tensors compared, and a problem for each that differs."""
    config = checkpoint.config
    ties = model.config.tie_word_embeddings and not takes_file_head(checkpoint.manifest)
    tied = replace(config, tie_word_embeddings=ties)
    base = from_huggingface(model, tied, files)
    total = sum(file.header.file_size for file in checkpoint.ranks)
    done = count = 0
    problems = []
    for rank, file in enumerate(checkpoint.ranks):
        for name, plan in base.rank_tensors(rank).items():
            info = file.header.get(name)
            if info is None:  # a tied LM head that is left out
                continue
            if not all(_same(plan, file, info, files)):
                what, why = f"tensor {name!r} differs from the model", "the values are not those of a conversion"
                problems.append(Problem(what, str(file.path), why, "convert again"))
            count, done = count + 1, done + info.nbytes
            progress("compare", done, total, "bytes")
        drafter = sum(t.nbytes for name, t in file.header.items() if name.startswith(DRAFTER))
        done += drafter + file.header.file_size - sum(t.nbytes for t in file.header.values())
    progress("compare", total, total, "bytes")
    return count, problems


def compare_checkpoints(found: Path, expected: Path, progress: Progress) -> tuple[int, list[Problem]]:
    """Compare all tensors of two checkpoints, the drafter's included, bit for bit: how many, and the differences."""
    files = OpenFiles()
    try:
        ours, theirs = Checkpoint.open(found), Checkpoint.open(expected)
        if len(ours.ranks) != len(theirs.ranks):
            what = f"there are {len(ours.ranks)} ranks, the other checkpoint has {len(theirs.ranks)}"
            return 0, [Problem(what, str(found), None, "compare with the checkpoint it was made from")]
        count, problems = 0, list[Problem]()
        for rank, other in zip(ours.ranks, theirs.ranks, strict=True):
            progress("compare", count, sum(len(r.header) for r in ours.ranks), "tensors")
            problems += _rank_differences(rank, other, files)
            count += len(rank.header)
        return count, limited(problems)
    finally:
        files.close()


def _rank_differences(rank: SafetensorsFile, other: SafetensorsFile, files: OpenFiles) -> Iterator[Problem]:
    if rank.path.samefile(other.path):  # a link, as in engines where the file system allows it
        return
    for name in sorted({*rank.header, *other.header}):
        info, expected = rank.header.get(name), other.header.get(name)
        if info is None or expected is None:
            yield Problem(f"only one of the two has the tensor {name!r}", str(rank.path), None, "build it again")
        elif (info.dtype, info.shape) != (expected.dtype, expected.shape):
            why = f"{info.dtype} {list(info.shape)} and {expected.dtype} {list(expected.shape)}"
            yield Problem(f"tensor {name!r} has another dtype or shape", str(rank.path), why, "build it again")
        elif not all(_same(whole(name, FileSource(other.path, expected, files)), rank, info, files)):
            what = f"tensor {name!r} differs from the checkpoint's"
            yield Problem(what, str(rank.path), f"{other.path} has other values", "build it again from the checkpoint")


def _same(plan: TensorPlan, file: SafetensorsFile, info: TensorInfo, files: OpenFiles) -> Iterator[bool]:
    """For each chunk of the planned tensor: are the file's bytes the same?"""
    at = info.begin
    for block in blocks(plan):
        if isinstance(block, Extent):
            for begin in range(block.begin, block.end, CHUNK_BYTES):
                size = min(CHUNK_BYTES, block.end - begin)
                expected = bytearray(size)
                files.read_into(block.path, memoryview(expected), begin)
                yield _bytes_equal(memoryview(expected), file.path, at, files)
                at += size
        else:
            data = tensor_bytes(block)
            yield _bytes_equal(data, file.path, at, files)
            at += len(data)
    yield at == info.end


def _bytes_equal(expected: memoryview, path: Path, at: int, files: OpenFiles) -> bool:
    found = bytearray(len(expected))
    files.read_into(path, memoryview(found), at)
    return found == expected
