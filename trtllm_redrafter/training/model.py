"""The drafter as it is trained: all positions of a text at once, with a head that may borrow from the base model.

The function is `redrafter.Drafter`'s own, with teacher forcing: for the context at row i and the tokens that follow
it, the state after j of them predicts token j + 1, exactly what the beam search will feed when its drafts are right.
What differs is the LM head, the bulk of a drafter's bytes:

    full     a matrix [V, E] of its own, trained
    tied     the base model's head [V, H]; needs exit_dim == hidden size
    factor   base head [V, H] x a small trained matrix [H, E]

The last two ship without the big matrix (`tie_lm_head: true` in the config); conversion multiplies it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from trtllm_redrafter.errors import Problem, UsageError, raise_together
from trtllm_redrafter.redrafter.config import DrafterConfig
from trtllm_redrafter.redrafter.drafter import Drafter


class HeadKind(str, Enum):
    """Where the LM head comes from; the values are those of the command line."""

    FULL = "full"
    TIED = "tied"
    FACTOR = "factor"


@dataclass(frozen=True)
class DrafterSpec:
    """What is trained: sizes, head, and how far ahead."""

    config: DrafterConfig
    head: HeadKind
    draft_len: int

    def problems(self) -> list[Problem]:
        found = []
        if self.draft_len < 1:
            found.append(Problem(f"draft_len is {self.draft_len}", remedy="draft at least one token"))
        if self.config.num_layers < 0:
            found.append(Problem(f"num_layers is {self.config.num_layers}", remedy="use 0 or more"))
        if self.head is HeadKind.TIED and self.config.exit_dim != self.config.hidden_size:
            found.append(
                Problem(
                    f"a tied head needs exit_dim {self.config.hidden_size}, not {self.config.exit_dim}",
                    why="the base model's head multiplies vectors of its hidden size",
                    remedy="set exit_dim to the hidden size, or use the factor head",
                )
            )
        return found


@dataclass(frozen=True)
class InputScales:
    """Root mean square of each input column: the base's hidden states [H] and its embeddings [H].

    Final norms leave a few columns ten times larger than the rest, and embeddings are often small; an optimizer with
    one learning rate for all entries of a matrix then moves the outputs unevenly. Weights that read such a column are
    kept multiplied by its size while they train and divided when they are used: the function is the same.
    """

    context: Tensor
    embedding: Tensor

    @classmethod
    def measure(cls, hidden: Tensor, embedding: Tensor) -> InputScales:
        """From a sample of hidden states [N, H] and the embeddings of a sample of tokens [N, H]."""
        context, embedded = (x.float().pow(2).mean(dim=0).sqrt().clamp(min=1e-3).cpu() for x in (hidden, embedding))
        return cls(context, embedded)


class _ColumnScale(nn.Module):
    """Parametrization: the weight in use is the trained one times a fixed factor per input column."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.factor


class TrainableDrafter(nn.Module):
    """`Drafter` without its head, plus what the chosen head trains."""

    def __init__(
        self, spec: DrafterSpec, *, seed: int, base_head: Tensor | None = None, scales: InputScales | None = None
    ) -> None:
        """`base_head` [V, H] starts a full head of width H; other heads never copy it."""
        super().__init__()
        raise_together(UsageError, spec.problems(), "the drafter's sizes do not fit")
        self.spec = spec
        config = spec.config
        with torch.device("meta"):  # the full head may be gigabytes; only what is trained is allocated
            self.core = Drafter(config)
            del self.core.lm_head
        self.core.to_empty(device="cpu")
        width = config.exit_dim
        self.factor = nn.Linear(width, config.hidden_size, bias=False) if spec.head is HeadKind.FACTOR else None
        self.full_head = nn.Linear(width, config.vocab_size, bias=False) if spec.head is HeadKind.FULL else None
        self._reset(seed, base_head)
        if scales is not None:
            self._scale_inputs(scales)

    def _scale_inputs(self, scales: InputScales) -> None:
        """Let every matrix that reads raw hidden states or embeddings see them at size one."""
        ones = torch.ones_like(scales.context)
        wide = torch.cat([1.0 / scales.context, ones])
        readers: list[tuple[nn.Module | None, Tensor]] = [(self.core.rnn_w, 1.0 / scales.embedding)]
        if self.core.input_proj is not None:
            readers.append((self.core.input_proj, wide))
        else:  # the residual stream itself starts with the hidden state
            blocks = [module for module in self.core.layers.modules() if isinstance(module, nn.Linear)]
            readers += [(module, wide) for module in (*blocks, self.factor, self.full_head)]
        for module, factor in readers:
            if isinstance(module, nn.Linear):
                started = module.weight.detach().clone()
                parametrize.register_parametrization(module, "weight", _ColumnScale(factor), unsafe=True)
                module.weight = started * factor

    def _reset(self, seed: int, base_head: Tensor | None) -> None:
        """Small random weights; blocks start near the identity, a borrowed head near the base model's reading."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                std = parameter.shape[1] ** -0.5 * (0.5 if ".layers." in name else 1.0)
                nn.init.normal_(parameter, std=std, generator=generator)
        if self.factor is not None:
            nn.init.normal_(self.factor.weight, std=0.1 * self.factor.weight.shape[1] ** -0.5, generator=generator)
        if self.full_head is not None and base_head is not None and base_head.shape == self.full_head.weight.shape:
            self.full_head.weight.data.copy_(base_head)

    def states(self, following: Tensor, rows: int) -> Tensor:
        """States after 1..L of the tokens that follow each row. [W, S + L - 1 or more, H] -> [W, L, S, H].

        `Drafter.next_state` for every row and position; a token's own product serves all rows that it follows.
        """
        core, read = self.core, following
        if core.rnn_w is not None:
            read = core.rnn_w(following)
        state = following.new_zeros(following.shape[0], rows, following.shape[2])
        states = []
        for j in range(self.spec.draft_len):
            own = read[:, j : j + rows]
            state = own + state if core.rnn_u is None else F.silu(own + core.rnn_u(state))
            states.append(state)
        return torch.stack(states, dim=1)

    def _features(self, context: Tensor, states: Tensor) -> Tensor:
        """`Drafter.features`; the context's product is computed once for all positions. -> [W, L, S, E]."""
        core = self.core
        if core.input_proj is None:
            return core.features(context.unsqueeze(1).expand_as(states), states)
        weight, width = core.input_proj.weight, context.shape[-1]
        x = F.linear(context, weight[:, :width], core.input_proj.bias).unsqueeze(1)
        x = x + F.linear(states, weight[:, width:])
        for layer in core.layers:
            x = layer(x)
        return x

    def forward(self, context: Tensor, following: Tensor) -> Tensor:
        """What the head reads, for every row and position.

        context [W, S, H]: base hidden state of each row. following [W, >= S + L - 1, H]: embeddings; row i's first
        following token is at i. Returns [W, L, S, D] with D the width of `head_of`'s rows.
        """
        features = self._features(context, self.states(following, context.shape[1]))
        return features if self.factor is None else self.factor(features)

    def project(self, context: Tensor, state: Tensor) -> Tensor:
        """The same for one round of a beam search. [..., H], [..., H] -> [..., D]."""
        features = self.core.features(context, state)
        return features if self.factor is None else self.factor(features)

    def head_of(self, base_head: Tensor) -> Tensor:
        """Rows that `forward`'s output is multiplied with, [V, D]."""
        return base_head if self.full_head is None else self.full_head.weight

    def logits(self, context: Tensor, state: Tensor, base_head: Tensor) -> Tensor:
        """[..., H], [..., H] -> [..., V]."""
        return F.linear(self.project(context, state), self.head_of(base_head))
