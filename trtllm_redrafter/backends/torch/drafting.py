"""An engine's drafter, and the search that its executor runs fastest.

The LM head may be cut to the vocabulary's most frequent rows (`draft_vocab.safetensors`, written by the trainer):
at batch 1 a 49,152-row head costs more than the rest of the drafter. This changes what is drafted, so it can
change the acceptance length, and never the output.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from trtllm_redrafter.backends.torch.cuda.executor import CudaExecutor
from trtllm_redrafter.backends.torch.cuda.search import SearchKernel
from trtllm_redrafter.backends.torch.cuda.steps import DeviceSteps
from trtllm_redrafter.backends.torch.cuda_graphs import GraphSearch
from trtllm_redrafter.backends.torch.executor import ModelExecutor
from trtllm_redrafter.backends.torch.low_rank import LowRankHead
from trtllm_redrafter.backends.torch.native.drafter import NativeSearch
from trtllm_redrafter.backends.torch.native.executor import NativeExecutor
from trtllm_redrafter.backends.torch.search import PlainSearch, Search
from trtllm_redrafter.checkpoint.draft_vocab import read_draft_vocab
from trtllm_redrafter.checkpoint.names import DRAFT_VOCAB_FILE
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.redrafter.beam_search import DraftHead, draft_head
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter

_PREFIX = "drafter."


def load_drafter(checkpoint: Checkpoint, config: DrafterConfig, device: torch.device) -> Drafter:
    """The checkpoint's drafter as a module, its parameters memory-mapped where the checkpoint is."""
    with torch.device("meta"):
        drafter = Drafter(config)
    for name, _ in list(drafter.named_parameters()):
        owner = drafter.get_submodule(name.rpartition(".")[0])
        tensor = checkpoint.load(_PREFIX + name).to(device)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    return drafter.eval()


def frequent_rows(folder: Path, count: int, vocab_size: int) -> Tensor | None:
    """The `count` most frequent token ids, if the checkpoint names them."""
    file = folder / DRAFT_VOCAB_FILE
    return read_draft_vocab(file, vocab_size)[:count] if count > 0 and file.exists() else None


def _factored(head: DraftHead, low_rank: LowRankHead) -> DraftHead:
    """The same head as the base model's rows times a small matrix, which is less to read."""
    base = low_rank.base_head if head.rows is None else low_rank.base_head[head.rows].contiguous()
    return replace(head, weight=base, factor=low_rank.factor.to(base.device))


def make_search(
    drafter: Drafter,
    executor: ModelExecutor,
    embedding: Tensor,
    shape: DraftShape,
    *,
    rows: Tensor | None,
    max_batch_size: int,
    low_rank: LowRankHead | None,
) -> Search:
    """The fastest search that runs beside an executor. `rows`: the token ids that the LM head is cut to."""
    if isinstance(executor, NativeExecutor) and NativeSearch.supports(drafter, rows):
        rows = None if rows is None else rows.sort().values
        return NativeSearch(executor, drafter, rows, shape, max_batch_size=max_batch_size, low_rank=low_rank)
    head = draft_head(drafter, rows)
    if isinstance(executor, CudaExecutor):
        factored = head if low_rank is None else _factored(head, low_rank)
        if SearchKernel.unsupported(drafter, embedding, factored, shape) is None:
            return SearchKernel(drafter, embedding, factored, shape, max_batch_size=max_batch_size)
    if executor.pool is not None:
        return GraphSearch(drafter, embedding, head, shape, executor.pool)
    return PlainSearch(drafter, embedding, head, shape)


def device_steps(executor: ModelExecutor, search: Search | None, max_batch_size: int) -> DeviceSteps | None:
    """Whole steps on the device, where both the base model's pass and the search are our CUDA kernels."""
    if isinstance(executor, CudaExecutor) and (search is None or isinstance(search, SearchKernel)):
        return DeviceSteps(executor, search, max_batch_size=max_batch_size)
    return None
