"""Answers by this package's own engine of the base model, made for the occasion and thrown away.

The base model goes through convert and build without a drafter, and the torch backend's batch writes the answers:

    with engine_writer(base, work_dir, options) as writer:
        train(plan, progress, writer=writer)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trtllm_redrafter.backends.torch.temporary import temporary_directory, temporary_runner
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.fsio import made_parents
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.training.plan import TrainPlan
from trtllm_redrafter.training.self_distill import AnswerWriter, RunnerWriter


@dataclass(frozen=True)
class EngineWriterOptions:
    """Sizes of the engine: `batch` answers at once, prompts of `max_prompt` tokens, `max_tokens` with the answer."""

    dtype: str
    device: str
    batch: int
    max_prompt: int
    max_tokens: int


@contextmanager
def engine_writer(
    base: Path, work_dir: Path, options: EngineWriterOptions, progress: Progress
) -> Iterator[RunnerWriter]:
    """A writer whose engine lies in `work_dir` for as long as the block lasts."""
    with made_parents(work_dir / "engine"), temporary_directory(beside=work_dir / "engine") as folder:
        wanted = ConvertOptions(
            base=base, drafter=None, output=folder / "checkpoint", dtype=options.dtype, tp_size=1, num_beams=None,
            draft_len=None, greedy=True, parallel_embedding=False, workers=1, overwrite=False,
        )  # fmt: skip
        checkpoint = convert(plan_conversion(wanted), progress)
        engine = temporary_runner(
            checkpoint, folder, max_batch_size=options.batch, max_input_len=options.max_prompt,
            max_seq_len=options.max_tokens, device=options.device, tokenizer=base, progress=progress,
        )  # fmt: skip
        with engine as runner:
            yield RunnerWriter(runner)


@contextmanager
def answer_writer(plan: TrainPlan, progress: Progress) -> Iterator[AnswerWriter | None]:
    """Who writes a plan's answers: an engine; None, so transformers, where several processes share the work."""
    if not plan.prompts or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield None
        return
    options = plan.options
    longest = max(len(prompt.token_ids) for prompt in plan.prompts)
    sizes = EngineWriterOptions(
        dtype=options.dtype,
        device=options.device,
        batch=options.writing.batch,
        max_prompt=longest,
        max_tokens=longest + options.writing.max_tokens,
    )
    with engine_writer(options.base, options.work_dir, sizes, progress) as writer:
        yield writer
