"""Does the engine's drafter compute what the checkpoint's drafter does?

A wrong drafter changes no text, only the speed, and a slightly wrong one hardly even that. Where an engine returns its
drafts, their scores are compared with exact ones: the engine drafts from given states, then the checkpoint's drafter
computes the log-probabilities of the same tokens, once exactly and once in the engine's dtype, as `distributions` does
for the base model. The states are given, so the base model takes no part.

    check = check_drafts(beams, contexts, checkpoint, head_rows=8192)
    check.render(), list(check.problems(engine))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.backends.torch.drafting import frequent_rows, load_drafter
from trtllm_redrafter.backends.torch.weights import DTYPES
from trtllm_redrafter.checkpoint.names import EMBEDDING
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.redrafter.beam_search import Beams, DraftHead, draft_head
from trtllm_redrafter.redrafter.config import TOP_CANDIDATES
from trtllm_redrafter.redrafter.drafter import Drafter
from trtllm_redrafter.verify.reference import EXACT, UNIT_ROUNDOFF, Text

CONTEXTS = 128
"""States to draft from; of more, an evenly spaced selection is taken."""

TYPICAL, WORST = 2.0, 8.0
"""Limits, in units of the rounding error; docs/verification.md shows the intact engines they are based on."""

_CHUNK = 16
"""Contexts computed at once; each has a row of logits per beam."""


@dataclass(frozen=True)
class DraftCheck:
    """`typical` (median) and `worst` over contexts: RMS error of a context's log-probabilities, over rounding's."""

    dtype: str
    contexts: int
    typical: float
    worst: float
    difference: float
    """Median over contexts, in nats per drafted token."""

    @property
    def ok(self) -> bool:
        return self.typical <= TYPICAL and self.worst <= WORST

    def render(self) -> str:
        return (
            f"  drafter     {self.contexts} contexts, over what {self.dtype} rounds there (allowed): "
            f"typical {self.typical:.2f} ({TYPICAL:g}), worst {self.worst:.2f} ({WORST:g}); "
            f"{self.difference:.2g} nats per token"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def problems(self, where: Path) -> Iterator[Problem]:
        if self.ok:
            return
        what = "the drafter's log-probabilities are further from exact than rounding explains"
        why = f"in units of what {self.dtype} rounds: typical {self.typical:.2f}, worst {self.worst:.2f}"
        remedy = "compare the drafter's tensors with `verify --against` and `--drafter`, and build the engine again"
        yield Problem(what, str(where), why, remedy)


def pick_contexts(
    states: Sequence[Tensor], texts: Sequence[Text], count: int = CONTEXTS
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """States [B, H] and the token after each, evenly spaced; `states` [n, H] belong to a text's first n tokens."""
    contexts = torch.cat(list(states))
    roots = [token for text, rows in zip(texts, states, strict=True) for token in text.tokens[: len(rows)]]
    chosen = torch.linspace(0, len(roots) - 1, min(count, len(roots))).long()
    return contexts[chosen.to(contexts.device)], [roots[i] for i in chosen.tolist()]


def check_drafts(beams: Beams, contexts: Tensor, checkpoint: Checkpoint, *, head_rows: int) -> DraftCheck:
    """Scores of `beams`, which the engine drafted from `contexts` [B, H]; `head_rows` as in `frequent_rows`."""
    dtype = checkpoint.config.dtype
    tokens = beams.tokens.masked_fill(~beams.finite.view(-1, 1, 1), 0).to(contexts.device)  # else they mean nothing
    exact = _beam_log_probs(checkpoint, EXACT[dtype], contexts, tokens, head_rows)
    rounded = _beam_log_probs(checkpoint, DTYPES[dtype], contexts, tokens, head_rows).to(exact)
    found = beams.path_scores.to(exact).diff(dim=-1)
    floor = UNIT_ROUNDOFF[dtype] / 4 * exact.abs().mean()
    rounding = _rms(rounded - exact).clamp_min(float(floor))
    difference = _rms(found - exact)
    unit = rounding.clamp_min(rounding.median())
    ratios = torch.where(difference.isfinite(), difference, torch.inf) / unit
    typical = float(torch.where(difference.isfinite(), difference, torch.inf).median() / rounding.median())
    return DraftCheck(dtype, len(tokens), typical, float(ratios.max()), float(difference.median()))


def _rms(difference: Tensor) -> Tensor:
    """[B, K, L] -> [B]."""
    return difference.flatten(1).pow(2).mean(dim=-1).sqrt()


@torch.no_grad()
def _beam_log_probs(
    checkpoint: Checkpoint, dtype: torch.dtype, contexts: Tensor, tokens: Tensor, head_rows: int
) -> Tensor:
    """[B, K, L]: log-probability of each drafted token of [B, K, L+1] beams given those before, computed in `dtype`."""
    config = checkpoint.config.drafter
    assert config is not None
    drafter = load_drafter(checkpoint, config, contexts.device).to(dtype)
    embedding = checkpoint.load(EMBEDDING).to(contexts.device)
    head = draft_head(drafter, frequent_rows(checkpoint.path, head_rows, checkpoint.config.vocab_size))
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(tokens), _CHUNK)]
    return torch.cat([_score(drafter, embedding, head, contexts[part].to(dtype), tokens[part]) for part in chunks])


def _score(drafter: Drafter, embedding: Tensor, head: DraftHead, contexts: Tensor, tokens: Tensor) -> Tensor:
    """[B, H] and [B, K, L+1] -> [B, K, L]. A token that rounding puts below the cut keeps its own score."""
    state = contexts.new_zeros(*tokens.shape[:2], contexts.shape[-1])
    context = contexts.unsqueeze(1).expand_as(state)
    found = []
    for place in range(tokens.shape[-1] - 1):
        state = drafter.next_state(state, F.embedding(tokens[..., place], embedding).to(state))
        logits = head.project(drafter.features(context, state))
        logits = logits if logits.dtype is torch.float64 else logits.float()
        chosen = tokens[..., place + 1]
        columns = chosen if head.rows is None else torch.searchsorted(head.rows, chosen.contiguous())
        candidates = logits.topk(min(TOP_CANDIDATES, logits.shape[-1]), dim=-1).values
        found.append(logits.gather(-1, columns.unsqueeze(-1)).squeeze(-1) - candidates.logsumexp(dim=-1))
    return torch.stack(found, dim=-1)
