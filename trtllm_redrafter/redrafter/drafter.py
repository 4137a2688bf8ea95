"""The ReDrafter head: an RNN over drafted tokens, conditioned on the base model's last hidden state.

For a context vector c (base model's hidden state of the last accepted token, after the final norm) and the
tokens t_1, t_2, ... that follow it, with e(t) the base model's own input embedding:

    s_0 = 0
    s_j = SiLU(W e(t_j) + U s_{j-1} + u)     rnn          s_j = e(t_j) + s_{j-1}     otherwise
    x   = [c ; s_j]  -> input_proj (only when E != 2H) -> x + SiLU(A x + a), once per layer
    logits of t_{j+1} = lm_head x

Apple's ml-recurrent-drafter v1.1 and TensorRT-LLM >= 0.14 compute this same function. Parameter names are
TensorRT-LLM's, without the `drafter.` prefix; `convert` maps Apple's onto them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtllm_redrafter.redrafter.config import DrafterConfig


class ResBlock(nn.Module):
    """x + SiLU(A x + a)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Drafter(nn.Module):
    """All trained parts of the drafter; embeddings come from the base model and are passed in."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        h, e = config.hidden_size, config.exit_dim
        self.input_proj = nn.Linear(2 * h, e) if config.has_input_proj else None
        self.layers = nn.ModuleList(ResBlock(e) for _ in range(config.num_layers))
        self.lm_head = nn.Linear(e, config.vocab_size, bias=False)
        self.rnn_u = nn.Linear(h, h) if config.rnn else None
        self.rnn_w = nn.Linear(h, h, bias=False) if config.rnn else None

    def next_state(self, state: Tensor, embedding: Tensor) -> Tensor:
        """State after one more token. Two [..., H] -> [..., H]."""
        if self.rnn_u is None or self.rnn_w is None:
            return embedding + state
        return F.silu(self.rnn_w(embedding) + self.rnn_u(state))

    def features(self, context: Tensor, state: Tensor) -> Tensor:
        """Input of the LM head. Two [..., H] -> [..., E]."""
        x = torch.cat([context, state], dim=-1)
        if self.input_proj is not None:
            x = self.input_proj(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def logits(self, context: Tensor, state: Tensor) -> Tensor:
        """[..., H], [..., H] -> [..., V]."""
        logits: Tensor = self.lm_head(self.features(context, state))
        return logits
