"""Sizes of a drafter and of its drafts, with every derived value in one place."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_redrafter.errors import Problem, UsageError, raise_together

MAX_NUM_BEAMS = 50
"""With more beams, tokens cut by the drafter's top-50 would be drafted and, in TensorRT-LLM, always accepted."""

MAX_DRAFT_LEN = 256
"""Drafters are trained for 3 to 10 tokens; trees, masks and caches grow with this number and are allocated up front."""

NVIDIA_NUM_BEAMS = 5
NVIDIA_DRAFT_LEN = 5
"""The defaults of NVIDIA's ReDrafter converter, for drafters that do not state their own."""

TOP_CANDIDATES = 50
"""In every round, logits below the 50th largest are cut (Apple v1.1, TensorRT-LLM >= 0.14)."""

CUT = -50000.0
"""Value of a cut logit, and score of a beam that does not exist yet; finite, so that fp16 arithmetic yields no NaN."""


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a ReDrafter head: H hidden size, E exit_dim, V vocabulary.

    The RNN runs in H; the residual blocks and the LM head in E. `input_proj` exists only when E differs
    from 2H, the width of the concatenated [context, state].
    """

    vocab_size: int
    hidden_size: int
    exit_dim: int
    num_layers: int
    rnn: bool = True

    @property
    def has_input_proj(self) -> bool:
        return self.exit_dim != 2 * self.hidden_size

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every parameter, in TensorRT-LLM's names without the `drafter.` prefix."""
        h, e, v = self.hidden_size, self.exit_dim, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {}
        if self.has_input_proj:
            shapes |= {"input_proj.weight": (e, 2 * h), "input_proj.bias": (e,)}
        for i in range(self.num_layers):
            shapes |= {f"layers.{i}.linear.weight": (e, e), f"layers.{i}.linear.bias": (e,)}
        shapes["lm_head.weight"] = (v, e)
        if self.rnn:
            shapes |= {"rnn_u.weight": (h, h), "rnn_u.bias": (h,), "rnn_w.weight": (h, h)}
        return shapes


@dataclass(frozen=True)
class DraftShape:
    """How much is drafted per step: K beams of L tokens.

    L does not count the token the base model guarantees (Apple's `beam_length` is L + 1).
    """

    num_beams: int
    draft_len: int

    @property
    def name(self) -> str:
        """As grids and reports write it: 2x3."""
        return f"{self.num_beams}x{self.draft_len}"

    @property
    def max_draft_tokens(self) -> int:
        """Tokens that all beams draft together, when no prefix is shared."""
        return self.num_beams * self.draft_len

    @property
    def max_tree_tokens(self) -> int:
        """Root (the guaranteed token) plus every drafted token, when no prefix is shared."""
        return 1 + self.max_draft_tokens

    def problems(self) -> list[Problem]:
        """Why this shape cannot be drafted, all reasons together."""
        found = []
        if self.num_beams < 1:
            found.append(Problem(f"num_beams is {self.num_beams}", remedy="use at least 1"))
        if self.num_beams > MAX_NUM_BEAMS:
            found.append(
                Problem(
                    f"num_beams is {self.num_beams}, more than {MAX_NUM_BEAMS}",
                    why=f"each round keeps the {TOP_CANDIDATES} likeliest tokens only; further beams would hold cut "
                    "tokens, which TensorRT-LLM then accepts whatever the base model says",
                    remedy=f"use {MAX_NUM_BEAMS} or fewer",
                )
            )
        if self.draft_len < 1:
            found.append(
                Problem(
                    f"draft_len is {self.draft_len}",
                    why="it counts drafted tokens only, not the one the base model guarantees",
                    remedy="use at least 1, or switch drafting off",
                )
            )
        if self.draft_len > MAX_DRAFT_LEN:
            found.append(
                Problem(
                    f"draft_len is {self.draft_len}, more than {MAX_DRAFT_LEN}",
                    why="no drafter looks that far ahead, and memory for every drafted token is reserved up front",
                    remedy=f"use {MAX_DRAFT_LEN} or fewer, at most what the drafter was trained for",
                )
            )
        return found

    def check(self) -> None:
        raise_together(UsageError, self.problems(), f"cannot draft {self.num_beams} beams of {self.draft_len} tokens")
