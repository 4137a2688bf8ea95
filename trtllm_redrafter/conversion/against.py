"""Compare a checkpoint with the Hugging Face model it was made from, bit for bit.

The conversion is planned again from the model with the checkpoint's own settings and walked block by block, but
compared with the files instead of written. This covers splits, padding, repeated KV heads and casts on every rank.

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
from trtllm_redrafter.checkpoint.verify import VerifyReport, checkpoint_directory, verify_files
from trtllm_redrafter.conversion.base import from_huggingface
from trtllm_redrafter.conversion.head import takes_file_head
from trtllm_redrafter.conversion.shards import Extent, TensorPlan, blocks
from trtllm_redrafter.conversion.sources import OpenFiles
from trtllm_redrafter.errors import Problem, RedrafterError, limited
from trtllm_redrafter.progress import Progress

CHUNK_BYTES = 2**20

COMPARED_FIELDS = (
    "base_architecture", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_size", "vocab_size", "norm_epsilon", "hidden_act", "max_position_embeddings",
    "rotary_base", "rotary_scaling", "attn_bias", "mlp_bias",
)  # fmt: skip
"""Config fields in which checkpoint and model must agree."""


def verify(path: Path, *, against: Path | None, hashes: bool, progress: Progress) -> VerifyReport:
    """Files against manifest and layout; with `against`, values against the Hugging Face model too."""
    model = None if against is None else HFModel.open(against)
    report = verify_files(path, hashes=hashes)
    if model is None or not report.ok:
        return report
    files = OpenFiles()
    try:
        checkpoint = Checkpoint.open(checkpoint_directory(path))
        problems = _config_problems(checkpoint.config, model.config, path)
        checks, notes = report.checks, report.notes
        if not problems and checkpoint.config.quant_algo is not None:
            notes += (f"values are not compared: the checkpoint is quantized as {checkpoint.config.quant_algo}",)
        elif not problems:
            count, problems = _compare(checkpoint, model, files, progress)
            checks += (f"values of {count} tensors on {len(checkpoint.ranks)} rank(s), bit for bit, against {against}",)
            if checkpoint.config.drafter is not None:
                notes += ("the drafter's values are not in the base model and are covered by the hashes only",)
    except RedrafterError as e:
        return replace(report, problems=tuple(e.problems or (e.problem,)))
    finally:
        files.close()
    return VerifyReport(path, checks, tuple(limited(problems)), notes)


def _config_problems(config: CheckpointConfig, expected: CheckpointConfig, path: Path) -> list[Problem]:
    remedy = "compare with the model the checkpoint was made from"
    return [
        Problem(f"{name} is {ours!r}, the model's is {theirs!r}", str(path), None, remedy)
        for name in COMPARED_FIELDS
        if (ours := getattr(config, name)) != (theirs := getattr(expected, name))
    ]


def _compare(checkpoint: Checkpoint, model: HFModel, files: OpenFiles, progress: Progress) -> tuple[int, list[Problem]]:
    """Number of compared tensors and those that differ."""
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


def _same(plan: TensorPlan, file: SafetensorsFile, info: TensorInfo, files: OpenFiles) -> Iterator[bool]:
    """Is each chunk of the planned tensor what lies in the file?"""
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
