"""The drafter and its beam search through the compiled kernels: one call per step.

It is `redrafter.beam_search` on the same weights; a test holds the two against each other. The plain one spends
most of its time at batch 1 in the dispatch of some two hundred small operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.low_rank import LowRankHead
from trtllm_redrafter.backends.torch.native.executor import NativeExecutor, Packer
from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.config import TOP_CANDIDATES, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter, ResBlock


class NativeDrafter:
    """The drafter's weights packed, with its LM head cut to `rows` of the vocabulary. bfloat16.

    With `low_rank`, the head is computed as base-model head times factor.
    """

    def __init__(
        self,
        executor: NativeExecutor,
        drafter: Drafter,
        rows: Tensor | None,
        *,
        max_batch_size: int,
        num_beams: int,
        low_rank: LowRankHead | None = None,
    ) -> None:
        head = drafter.lm_head.weight.detach() if low_rank is None else low_rank.base_head
        head = head if rows is None else head[rows]
        self._executor = executor  # also keeps the threads and the embedding alive
        self._rows = rows
        self._packer = Packer(executor.library)
        config, packer = drafter.config, self._packer
        recurrent, projected = drafter.rnn_u, drafter.input_proj
        self._handle: int | None = executor.library.redrafter_drafter_create(
            config.hidden_size,
            config.exit_dim,
            config.num_layers,
            max_batch_size * num_beams,
            None if recurrent is None else packer.matrix(recurrent.weight),
            None if recurrent is None else packer.floats(recurrent.bias),
            None if drafter.rnn_w is None else packer.matrix(drafter.rnn_w.weight),
            None if projected is None else packer.matrix(projected.weight),
            None if projected is None else packer.floats(projected.bias),
            None if low_rank is None else packer.matrix(low_rank.factor),
            packer.matrix(head),
            head.shape[0],
            None if rows is None else rows.data_ptr(),
        )
        if not self._handle:
            raise MemoryError("no memory for the drafter")
        for index, layer in enumerate(drafter.layers):
            assert isinstance(layer, ResBlock)
            executor.library.redrafter_drafter_set_layer(
                self._handle, index, packer.matrix(layer.linear.weight), packer.floats(layer.linear.bias)
            )

    @staticmethod
    def supports(drafter: Drafter, rows: Tensor | None) -> bool:
        """The kernels always cut to the 50 best, so there must be more rows, and sizes in whole vectors."""
        config = drafter.config
        count = config.vocab_size if rows is None else len(rows)
        sizes = (config.hidden_size, config.exit_dim)
        return count > TOP_CANDIDATES and all(size % 2 == 0 for size in sizes)

    def search(self, context: Tensor, first_token: Tensor, shape: DraftShape) -> Beams:
        """[B, H] bfloat16 and [B] -> beams of falling score."""
        context, first = context.contiguous(), first_token.contiguous()
        batch = first.shape[0]
        tokens = torch.empty(batch, shape.num_beams, shape.draft_len + 1, dtype=torch.int64)
        paths = torch.empty(tokens.shape)
        self._executor.library.redrafter_draft(
            self._executor.handle,
            self._handle,
            context.data_ptr(),
            first.data_ptr(),
            batch,
            shape.num_beams,
            shape.draft_len,
            tokens.data_ptr(),
            paths.data_ptr(),
        )
        return Beams(tokens, paths, None)

    def close(self) -> None:
        if self._handle:
            self._executor.library.redrafter_drafter_destroy(self._executor.handle, self._handle)
        self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
