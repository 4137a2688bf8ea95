"""Let the base model write the answers it will be drafted for, as lines on disk that survive an interruption.

A drafter predicts one model's habits, so that model's own answers are the best text to learn from. Answers are
appended to a JSON-lines file batch by batch; a later call with the same prompts and options continues after the last
complete line. `AnswerWriter` is an interface: transformers, or a backend's runner, such as that of a temporary engine
of the base model.

    answers = write_answers(prompts, TransformersWriter(base), options, Path("work/answers.jsonl"), no_progress)
    with engine_writer(base, work_dir, ...) as writer:
        train(plan, progress, writer=writer)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trtllm_redrafter.backends.base import Request, Runner, SamplingParams
from trtllm_redrafter.backends.torch.temporary import temporary_directory, temporary_runner
from trtllm_redrafter.base_models.transformers_model import generate
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.errors import InputError, Problem, not_finite
from trtllm_redrafter.fsio import as_output_error, made_parents
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.training.frozen_base import FrozenBase


@dataclass(frozen=True)
class WritingOptions:
    """How answers are written. `temperature` 0 is greedy; `batch` prompts are answered together."""

    max_tokens: int
    temperature: float
    seed: int
    batch: int

    def problems(self) -> list[Problem]:
        if self.max_tokens >= 2:
            return []
        return [Problem(f"answers of {self.max_tokens} tokens", remedy="a drafter learns from 2 tokens up")]


class AnswerWriter(Protocol):
    """Writes one answer per prompt, the end token included where the model ended. `first` numbers the prompts."""

    def write(self, prompts: Sequence[Sequence[int]], options: WritingOptions, first: int) -> list[list[int]]: ...


class _FiniteLogits:
    """A logits processor that notices rows without finite logits; it asks the device once, when all is written."""

    def __init__(self, base: FrozenBase) -> None:
        self._base = base
        self._broken = torch.zeros((), dtype=torch.bool, device=base.head.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        broken = ~scores.amax(dim=-1, keepdim=True).isfinite()
        self._broken |= broken.any()
        return scores.masked_fill(broken, 0.0)  # sampling from NaN would end the process that owns the GPU

    def check(self) -> None:
        if bool(self._broken):
            raise not_finite("the base model's logits", self._base.head.dtype, where=self._base.path)


class TransformersWriter:
    """Answers through transformers' generate: works for every base model, not fast."""

    def __init__(self, base: FrozenBase) -> None:
        self._base = base

    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]], options: WritingOptions, first: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(i)
        for length, members in sorted(by_length.items()):  # equal lengths: no padding, so no mask to get wrong
            torch.manual_seed(options.seed * 1_000_003 + first + members[0])
            tokens = torch.tensor([list(prompts[i]) for i in members], device=self._base.head.device)
            watch = _FiniteLogits(self._base)
            written = generate(
                self._base.model, tokens, max_new_tokens=options.max_tokens, eos=self._base.eos,
                temperature=options.temperature, watch=watch,
            )  # fmt: skip
            watch.check()
            for i, row in zip(members, written[:, length:].tolist(), strict=True):
                answers[i] = until_end(row, self._base.eos)
        return answers


class RunnerWriter:
    """Answers through a backend's engine, several times faster."""

    batches_at_once = 4
    """A prompt takes the place of one that is answered, so the batch runs empty only at the end."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def write(self, prompts: Sequence[Sequence[int]], options: WritingOptions, first: int) -> list[list[int]]:
        requests = [
            Request(
                tuple(prompt),
                SamplingParams(options.max_tokens, temperature=options.temperature, seed=options.seed + first + i),
            )
            for i, prompt in enumerate(prompts)
        ]
        return [list(result.token_ids) for result in self._runner.generate(requests)]


@contextmanager
def engine_writer(
    base: Path, work_dir: Path, *, dtype: str, device: str, batch: int, max_prompt: int, max_tokens: int,
    progress: Progress,
) -> Iterator[RunnerWriter]:  # fmt: skip
    """A writer with an engine in `work_dir` that is removed at the end of the block.

    The engine writes `batch` answers at once, to prompts of up to `max_prompt` tokens, `max_tokens` with the answer.
    """
    with made_parents(work_dir / "engine"), temporary_directory(beside=work_dir / "engine") as folder:
        wanted = ConvertOptions(
            base=base, drafter=None, output=folder / "checkpoint", dtype=dtype, tp_size=1, num_beams=None,
            draft_len=None, greedy=True, parallel_embedding=False, workers=1, overwrite=False,
        )  # fmt: skip
        checkpoint = convert(plan_conversion(wanted), progress)
        engine = temporary_runner(
            checkpoint, folder=folder, max_batch_size=batch, max_input_len=max_prompt, max_seq_len=max_tokens,
            device=device, tokenizer=base, progress=progress,
        )  # fmt: skip
        with engine as runner:
            yield RunnerWriter(runner)


def until_end(tokens: Sequence[int], eos: Sequence[int]) -> list[int]:
    """Tokens up to and including the first end token."""
    for i, token in enumerate(tokens):
        if token in eos:
            return list(tokens[: i + 1])
    return list(tokens)


def write_answers(
    prompts: Sequence[Sequence[int]], writer: AnswerWriter, options: WritingOptions, path: Path, progress: Progress
) -> list[list[int]]:
    """All answers, in the prompts' order; only those not yet in `path` are written."""
    key = answers_key(prompts, options)
    answers, good_bytes = _read_answers(path, key)
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if good_bytes else "wb") as file:
            file.truncate(good_bytes)  # an interruption can leave half a line
            file.seek(good_bytes)
            if not good_bytes:
                file.write(_line({"key": key, "options": asdict(options)}))
            for written in in_batches(prompts, writer, options, first=len(answers)):
                file.write(b"".join(_line({"answer": answer}) for answer in written))
                file.flush()
                answers += written
                progress("write answers", len(answers), len(prompts), "prompts")
    return answers


def in_batches(
    prompts: Sequence[Sequence[int]], writer: AnswerWriter, options: WritingOptions, first: int = 0
) -> Iterator[list[list[int]]]:
    """Answers to the prompts from number `first` on, as many at a time as the writer is best given."""
    step = options.batch * getattr(writer, "batches_at_once", 1)
    for start in range(first, len(prompts), step):
        yield writer.write(prompts[start : start + step], options, start)


def answers_key(prompts: Sequence[Sequence[int]], options: WritingOptions) -> str:
    """Changes when prompts or options do; of the options, `batch` matters only if answers are sampled."""
    content = json.dumps([[list(p) for p in prompts], asdict(options)])
    return hashlib.sha256(content.encode()).hexdigest()


def _line(content: object) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _read_answers(path: Path, key: str) -> tuple[list[list[int]], int]:
    """Complete answers of this run, and how many bytes of the file they take; ([], 0) to start over."""
    if not path.exists():
        return [], 0
    answers: list[list[int]] = []
    good_bytes = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            try:
                record = json.loads(raw)
                ended = raw.endswith(b"\n")
            except ValueError:
                break
            if not ended:
                break
            if number == 0:
                if record.get("key") != key:
                    raise InputError(
                        "holds the answers to other prompts or options",
                        where=path,
                        remedy="give this run another work directory, or remove the file",
                    )
            else:
                answers.append(record["answer"])
            good_bytes += len(raw)
    return answers, good_bytes
