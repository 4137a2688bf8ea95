"""Tiny engines for tests: write a base and a drafter, convert, build, load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.backends.base import BuildOptions
from trtllm_redrafter.backends.torch.backend import TorchBackend
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.backends.torch.search import Search
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.config import DraftShape

VOCAB = 64
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def write_tokenizer(path: Path, vocab_size: int = 259) -> Path:
    """A byte-level tokenizer (0 unknown, 1 begin, 2 end, then the bytes), with a chat template.

    A smaller vocabulary has the first of the bytes only.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab_size - 3]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return path


def write_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    drafter: bool = True,
    tp_size: int = 1,
    dtype: str = "auto",
    num_beams: int = 4,
    draft_len: int = 3,
    drafter_changes: dict[str, Any] | None = None,
    **base_changes: Any,
) -> Path:
    """A converted checkpoint `folder/checkpoint`, its sources beside it."""
    base_changes = {"vocab_size": VOCAB} | base_changes
    write_base(folder / "base", family, **base_changes)
    hidden, vocab = base_changes.get("hidden_size", 32), base_changes["vocab_size"]
    source = None
    if drafter:
        sizes = {"hidden_size": hidden, "exit_dim": 2 * hidden, "vocab_size": vocab} | (drafter_changes or {})
        source = write_drafter(folder / "drafter", **sizes)
    return convert_pair(
        folder,
        drafter=source is not None,
        tp_size=tp_size,
        dtype=dtype,
        num_beams=num_beams,
        draft_len=draft_len,
    )


def convert_pair(
    folder: Path,
    *,
    drafter: bool = True,
    tp_size: int = 1,
    dtype: str = "auto",
    num_beams: int = 4,
    draft_len: int = 3,
) -> Path:
    """Convert `folder/base` and `folder/drafter` to `folder/checkpoint`."""
    options = ConvertOptions(
        base=folder / "base",
        drafter=folder / "drafter" if drafter else None,
        output=folder / "checkpoint",
        dtype=dtype,
        tp_size=tp_size,
        num_beams=num_beams if drafter else None,
        draft_len=draft_len if drafter else None,
        greedy=True,
        parallel_embedding=False,
        workers=1,
        overwrite=False,
    )
    convert(plan_conversion(options), no_progress)
    return options.output


def build_options(checkpoint: Path, output: Path, tokenizer: Path | None = None, **changes: Any) -> BuildOptions:
    values: dict[str, Any] = {"max_batch_size": 4, "max_input_len": 100, "max_seq_len": 200, "overwrite": False}
    return BuildOptions(
        checkpoint=checkpoint, output=output, backend="torch", tokenizer=tokenizer, **(values | changes)
    )


def build_engine(checkpoint: Path, output: Path, tokenizer: Path | None = None, **changes: Any) -> Path:
    backend = TorchBackend()
    return backend.build(backend.plan(build_options(checkpoint, output, tokenizer, **changes)), no_progress)


def load(engine: Path, shape: DraftShape | None = None) -> TorchRunner:
    return TorchBackend().load(engine, device="cpu", verify_hashes=True, draft_shape=shape)


def make_runner(folder: Path, family: str = "llama", *, tokenizer: bool = False, **changes: Any) -> TorchRunner:
    """From nothing to a runner in one call."""
    checkpoint = write_checkpoint(folder, family, **changes)
    size = min(259, changes.get("vocab_size", VOCAB))
    text = write_tokenizer(folder / "tokenizer", size) if tokenizer else None
    return load(build_engine(checkpoint, folder / "engine", text))


class Oracle(Search):
    """A drafter that knows each request's continuation and spoils it at a random depth, in a random beam.

    Random weights are hardly ever right; with this one, steps accept anything from nothing to a whole beam.
    """

    def __init__(self, runner: TorchRunner, shape: DraftShape, truth: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__(shape, torch.float32)
        self._runner = runner
        self._truth = truth
        self._random = torch.Generator().manual_seed(5)

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=self._random))

    def beams(self, contexts: Tensor, roots: Sequence[int]) -> Beams:
        raise NotImplementedError("an oracle has no scores")

    def search(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> tuple[list[list[list[int]]], list[bool]]:
        drafting = [a for a in self._runner._active if a.request.draft and a.remaining > 1]
        assert [a.root for a in drafting] == list(roots)
        truths = [self._truth[a.request.token_ids][len(a.result.token_ids) :] for a in drafting]
        return [self._spoiled(truth, root) for truth, root in zip(truths, roots, strict=True)], [True] * len(roots)

    def _spoiled(self, truth: list[int], root: int) -> list[list[int]]:
        count, length = self.shape.num_beams, self.shape.draft_len
        beams = torch.randint(3, VOCAB, (count, length + 1), generator=self._random)
        right = truth[: self._below(length + 1)]
        beam, shared = self._below(count), self._below(count)
        beams[beam, 1 : len(right) + 1] = torch.tensor(right, dtype=torch.int64)
        beams[shared, 1 : len(right)] = torch.tensor(right[:-1], dtype=torch.int64)
        beams[:, 0] = root
        found: list[list[int]] = beams.tolist()
        return found


def with_oracle(runner: TorchRunner, truth: dict[tuple[int, ...], list[int]], shape: DraftShape) -> TorchRunner:
    runner._drafting, runner._steps = Oracle(runner, shape, truth), None
    return runner
