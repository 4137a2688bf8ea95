"""The drafter through the compiled kernels: two calls per round of the beam search.

It offers what `beam_search` asks of a drafter, with token ids where the plain drafter takes embeddings (the
kernels look them up) and finished logits where it gives features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.native.executor import LANES, NativeExecutor, Packer
from trtllm_redrafter.redrafter.drafter import Drafter, ResBlock


class NativeDrafter:
    """The drafter's weights packed, with its LM head cut to some rows. bfloat16."""

    def __init__(self, executor: NativeExecutor, drafter: Drafter, head_weight: Tensor, max_rows: int) -> None:
        self._executor = executor  # also keeps the threads and the embedding alive
        self._packer = Packer(executor.library)
        self._head_rows = head_weight.shape[0]
        self._width = -(-self._head_rows // LANES) * LANES
        config, packer = drafter.config, self._packer
        recurrent, projected = drafter.rnn_u, drafter.input_proj
        self._handle: int | None = executor.library.redrafter_drafter_create(
            config.hidden_size,
            config.exit_dim,
            config.num_layers,
            max_rows,
            None if recurrent is None else packer.matrix(recurrent.weight),
            None if recurrent is None else packer.floats(recurrent.bias),
            None if drafter.rnn_w is None else packer.matrix(drafter.rnn_w.weight),
            None if projected is None else packer.matrix(projected.weight),
            None if projected is None else packer.floats(projected.bias),
            packer.matrix(head_weight),
            self._head_rows,
        )
        if not self._handle:
            raise MemoryError("no memory for the drafter")
        for index, layer in enumerate(drafter.layers):
            assert isinstance(layer, ResBlock)
            executor.library.redrafter_drafter_set_layer(
                self._handle, index, packer.matrix(layer.linear.weight), packer.floats(layer.linear.bias)
            )

    def next_state(self, state: Tensor, embedding: Tensor) -> Tensor:
        """[B, R, H] states and [B, R] token ids -> [B, R, H]."""
        tokens, state = embedding.contiguous(), state.contiguous()
        result = torch.empty_like(state)
        self._executor.library.redrafter_drafter_states(
            self._executor.handle,
            self._handle,
            tokens.data_ptr(),
            state.data_ptr(),
            tokens.numel(),
            result.data_ptr(),
        )
        return result

    def features(self, context: Tensor, state: Tensor) -> Tensor:
        """[B, R, H], [B, R, H] -> logits [B, R, head rows]: the head is part of the call."""
        context, state = context.contiguous(), state.contiguous()
        logits = torch.empty(*state.shape[:-1], self._width)
        self._executor.library.redrafter_drafter_logits(
            self._executor.handle,
            self._handle,
            context.data_ptr(),
            state.data_ptr(),
            state.shape[:-1].numel(),
            logits.data_ptr(),
        )
        return logits[..., : self._head_rows]

    def close(self) -> None:
        if self._handle:
            self._executor.library.redrafter_drafter_destroy(self._handle)
        self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
