"""The drafter and its beam search through the compiled kernels: one call per step.

It is `redrafter.beam_search` on the same weights; a test compares the two. The plain one spends
most of its time at batch 1 in the dispatch of some two hundred small operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.low_rank import LowRankHead
from trtllm_redrafter.backends.torch.native.executor import NativeExecutor
from trtllm_redrafter.backends.torch.native.interface import BlockArguments, DrafterArguments, SearchArguments, call
from trtllm_redrafter.backends.torch.native.packing import Packer
from trtllm_redrafter.backends.torch.search import Search
from trtllm_redrafter.errors import MismatchError
from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.config import TOP_CANDIDATES, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter, ResBlock


class NativeSearch(Search):
    """The drafter's weights packed, with its LM head cut to `rows` of the vocabulary. bfloat16.

    With `low_rank`, the head is computed as base-model head times factor.
    """

    def __init__(
        self,
        executor: NativeExecutor,
        drafter: Drafter,
        rows: Tensor | None,
        shape: DraftShape,
        *,
        max_batch_size: int,
        low_rank: LowRankHead | None = None,
    ) -> None:
        super().__init__(shape, torch.bfloat16)
        head = drafter.lm_head.weight.detach() if low_rank is None else low_rank.base_head
        head = head if rows is None else head[rows]
        self._executor = executor  # also keeps the threads and the embedding alive
        self._packer = packer = Packer(executor.library)
        config, recurrent, projected = drafter.config, drafter.rnn_u, drafter.input_proj
        arguments = DrafterArguments(
            hidden=config.hidden_size,
            width=config.exit_dim,
            layers=config.num_layers,
            max_rows=max_batch_size * shape.num_beams,
            head_rows=head.shape[0],
            rnn_u=packer.matrix(None if recurrent is None else recurrent.weight),
            rnn_bias=packer.floats(None if recurrent is None else recurrent.bias),
            rnn_w=packer.matrix(None if drafter.rnn_w is None else drafter.rnn_w.weight),
            input_proj=packer.matrix(None if projected is None else projected.weight),
            input_bias=packer.floats(None if projected is None else projected.bias),
            factor=packer.matrix(None if low_rank is None else low_rank.factor),
            head=packer.matrix(head),
            token_of_column=packer.keep(None if rows is None else rows.to(torch.int64).contiguous()),
        )
        self._handle: int | None = None
        try:
            self._create(arguments, drafter)
        except ValueError as error:
            remedy = "convert again with a drafter that was trained for this base model"
            raise MismatchError("the drafter does not fit the base model", why=str(error), remedy=remedy) from error

    def _create(self, arguments: Any, drafter: Drafter) -> None:
        library, handle = self._executor.library, ctypes.c_void_p()
        call(library.redrafter_drafter_create, self._executor.handle, arguments, handle)
        self._handle = handle.value
        for index, layer in enumerate(drafter.layers):
            assert isinstance(layer, ResBlock)
            weight, bias = self._packer.matrix(layer.linear.weight), self._packer.floats(layer.linear.bias)
            call(library.redrafter_drafter_set_layer, self._handle, index, BlockArguments(weight=weight, bias=bias))

    @staticmethod
    def supports(drafter: Drafter, rows: Tensor | None) -> bool:
        """The kernels always cut to the 50 best, so there must be more rows, and sizes in whole vectors."""
        config = drafter.config
        count = config.vocab_size if rows is None else len(rows)
        sizes = (config.hidden_size, config.exit_dim)
        return count > TOP_CANDIDATES and all(size % 2 == 0 for size in sizes)

    def beams(self, contexts: Tensor, roots: Sequence[int]) -> Beams:
        """[B, H] bfloat16 and B tokens -> beams of falling score.

        Where a sequence's numbers are not finite, its scores are NaN and its tokens repeat the first.
        """
        context, first = contexts.to(torch.bfloat16).contiguous(), torch.tensor(list(roots))
        batch, shape = len(first), self.shape
        if tuple(context.shape) != (batch, self._executor.hidden_size):
            raise ValueError(f"contexts are {list(context.shape)}, not {[batch, self._executor.hidden_size]}")
        tokens = torch.empty(batch, shape.num_beams, shape.draft_len + 1, dtype=torch.int64)
        paths = torch.empty(tokens.shape)
        search = SearchArguments(
            context=context.data_ptr(),
            first=first.data_ptr(),
            tokens=tokens.data_ptr(),
            paths=paths.data_ptr(),
            batch=batch,
            beams=shape.num_beams,
            length=shape.draft_len,
        )
        call(self._executor.library.redrafter_draft, self._executor.handle, self._handle, search)
        return Beams(tokens, paths, None)

    def close(self) -> None:
        if self._handle:
            self._executor.library.redrafter_drafter_destroy(self._executor.handle, self._handle)
        self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
