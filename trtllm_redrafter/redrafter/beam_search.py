"""Draft K continuations of L tokens with a beam search over the drafter's distributions.

This is the search that TensorRT-LLM's graph runs. In each round the logits are shifted by their maximum, those below
the 50th largest are cut (ties with it are kept), and the rest go through a log-softmax. Running scores start at
[0, CUT, CUT, ...], so the first round branches from beam 0 only. Equal scores go to the lowest beam, then to the
lowest token id. The search is deterministic, which is what makes exact verification possible: drafts must not depend
on the random numbers that verify them.

Only tokens that remain after the cut can be drafted, so a round reads the full vocabulary once to find them and works
on a few dozen candidates from there. All beams are equal before the first round, which is computed for one row.

    beams = beam_search(drafter, base_embedding, context, first_token, DraftShape(num_beams=2, draft_len=3))
    beams.tokens[0]         # [[g, 5, 9, 2], [g, 5, 7, 7]], falling score; g is the first token
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.redrafter.config import CUT, TOP_CANDIDATES, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter

_TIE_MARGIN = 14
"""Candidates read beyond the 50 before checking whether more tie with the 50th; bf16 logits tie often."""

_CHUNK = 1024
"""Columns per chunk of the two-round top-k on a GPU."""


class DraftModel(Protocol):
    """What the search needs of a drafter: `Drafter`, or a backend's faster equivalent."""

    def next_state(self, state: Tensor, embedding: Tensor) -> Tensor: ...

    def features(self, context: Tensor, state: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DraftHead:
    """The drafter's LM head over the whole vocabulary, or over some of its rows.

    `project` maps features [..., E] to logits [..., R]. Fewer rows make a round cheaper and change what is drafted,
    but never what exact verification emits.
    """

    project: Callable[[Tensor], Tensor]
    vocab_size: int
    rows: Tensor | None = None
    """[R] token ids of the logits' columns, ascending; None: column i is token i."""

    weight: Tensor | None = None
    """[R, E] weight of `project`, for kernels that do the product themselves; [R, F] where there is a `factor`."""

    factor: Tensor | None = None
    """[F, E], applied to the features first: a low-rank head is the base model's head times a small matrix."""


def draft_head(drafter: Drafter, rows: Tensor | None = None) -> DraftHead:
    """The head of `drafter`, restricted to the token ids in `rows`; the weight is sliced once, here."""
    weight = drafter.lm_head.weight
    vocab_size = weight.shape[0]
    if rows is not None:
        rows = rows.to(device=weight.device, dtype=torch.int64).sort().values
        weight = weight.detach()[rows].contiguous()
    return DraftHead(lambda features: F.linear(features, weight), vocab_size, rows, weight)


@dataclass(frozen=True)
class Beams:
    """Drafted beams, best score first.

    `path_scores[b, k, j]` is the log-probability the drafter gives tokens 1..j of beam k together (0 at j = 0, the
    first token, which is certain); it never increases along a beam. `log_probs[b, k, j]` is the whole distribution
    that token j + 1 was taken from; only TensorRT-LLM's verification rule needs it.
    """

    tokens: Tensor  # [B, K, L+1] int64
    path_scores: Tensor  # [B, K, L+1]
    log_probs: Tensor | None  # [B, K, L, V]

    @property
    def scores(self) -> Tensor:
        return self.path_scores[..., -1]

    @property
    def finite(self) -> Tensor:
        """[B] bool; False where a sequence's scores are NaN or infinite, so that its tokens mean nothing."""
        return self.path_scores.isfinite().flatten(1).all(dim=1)


@dataclass(frozen=True)
class _Candidates:
    """Per row, the columns that remain after the cut, ascending, with log-probabilities; others may be there as CUT."""

    columns: Tensor  # [B, R, C]
    log_probs: Tensor  # [B, R, C]
    norm: Tensor  # [B, R, 1] log-sum-exp of the shifted logits that remain
    threshold: Tensor | None  # [B, R, 1] the 50th largest shifted logit; None: nothing is cut


def _candidates(logits: Tensor, vocab_size: int, missed_ties: list[Tensor] | None) -> _Candidates:
    """Max-normalise, cut and log-softmax, on the candidates alone. [..., R] -> [..., C] with C <= R.

    C grows until no tie with the 50th can have been missed: the smallest candidate is below it, or all columns are
    candidates. With `missed_ties`, whether C should have grown is recorded there instead, since a captured CUDA graph
    cannot branch.
    """
    width = logits.shape[-1]
    cuts = vocab_size > TOP_CANDIDATES and width >= TOP_CANDIDATES
    count = min(width, TOP_CANDIDATES + _TIE_MARGIN) if cuts else width
    while True:
        values, columns = _largest(logits, count)
        values = values - values[..., :1]
        threshold = values[..., TOP_CANDIDATES - 1 : TOP_CANDIDATES] if cuts else None
        if threshold is None or count == width:
            break
        missed = (values[..., -1:] >= threshold).any()
        if missed_ties is not None:
            missed_ties.append(missed)
            break
        if not bool(missed):
            break
        count = min(width, 4 * count)
    if threshold is not None:
        values = values.masked_fill(values < threshold, CUT)
    columns, order = columns.sort(dim=-1)
    values = values.gather(-1, order)
    norm = values.logsumexp(dim=-1, keepdim=True)
    return _Candidates(columns, values - norm, norm, threshold)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of [..., R], descending, and their columns.

    A GPU's top-k gives each row to one thread block, which is slow for a few long rows: there the best of each chunk
    are found first, in parallel.
    """
    width = logits.shape[-1]
    if logits.is_cuda and width >= 8 * _CHUNK and count <= _CHUNK // 2:
        return _largest_of_chunks(logits, count)
    values, columns = logits.topk(count, dim=-1)
    return values, columns


def _largest_of_chunks(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same in two rounds; `count` is at most a chunk's width and at most the row's."""
    padded = F.pad(logits, (0, -logits.shape[-1] % _CHUNK), value=-torch.inf)
    values, within = padded.view(*logits.shape[:-1], -1, _CHUNK).topk(count, dim=-1)
    first = torch.arange(0, padded.shape[-1], _CHUNK, device=logits.device).unsqueeze(-1)
    values, order = values.flatten(-2).topk(count, dim=-1)
    return values, (within + first).flatten(-2).gather(-1, order)


def _full_log_probs(logits: Tensor, found: _Candidates, head: DraftHead) -> Tensor:
    """The same distribution over the full vocabulary, cut tokens included. [..., R] -> [..., V]."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    if found.threshold is not None:
        shifted = shifted.masked_fill(shifted < found.threshold, CUT)
    if head.rows is not None:
        whole = shifted.new_full((*shifted.shape[:-1], head.vocab_size), CUT)
        shifted = whole.index_copy(-1, head.rows, shifted)
    return shifted - found.norm


def _best(total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of [B, N] and their positions; the lowest position wins a tie."""
    values, order = total.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], order[:, :count]


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """rows[b, index[b, k]]: [B, R, ...], [B, K] -> [B, K, ...]."""
    if rows.shape[0] == 1:
        return rows[0].index_select(0, index[0]).unsqueeze(0)
    view = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(*index.shape, *rows.shape[2:])
    return rows.gather(1, view)


def _start_scores(shape: DraftShape, context: Tensor, dtype: torch.dtype) -> Tensor:
    """[0, CUT, CUT, ...] per sequence: only beam 0 exists before the first round."""
    scores = torch.full((context.shape[0], shape.num_beams), CUT, dtype=dtype, device=context.device)
    scores[:, 0] = 0.0
    return scores


@torch.no_grad()
def beam_search(
    drafter: DraftModel,
    embedding: Tensor | Callable[[Tensor], Tensor],
    context: Tensor,
    first_token: Tensor,
    shape: DraftShape,
    *,
    head: DraftHead | None = None,
    keep_log_probs: bool = False,
    score_dtype: torch.dtype | None = torch.float32,
    missed_ties: list[Tensor] | None = None,
) -> Beams:
    """Draft from `context` [B, H] (hidden state of the last accepted token, after the final norm) and first_token [B].

    `embedding` is the base model's input embedding: [V, H], or a function of token ids. `head` defaults to the
    drafter's own. With `score_dtype` None, log-probabilities and running scores stay in the model's dtype as in
    TensorRT-LLM; in bf16, exact ties are then common. `missed_ties` collects, per round, whether more tokens tie with
    the 50th largest logit than were read; without it the search reads more. Raises `UsageError` for a shape that
    cannot be drafted.
    """
    rounds = search_rounds(
        drafter, embedding, context, first_token, shape,
        head=head, keep_log_probs=keep_log_probs, score_dtype=score_dtype, missed_ties=missed_ties,
    )  # fmt: skip
    return deque(rounds, maxlen=1)[0]


@torch.no_grad()
def search_rounds(
    drafter: DraftModel,
    embedding: Tensor | Callable[[Tensor], Tensor],
    context: Tensor,
    first_token: Tensor,
    shape: DraftShape,
    *,
    head: DraftHead | None = None,
    keep_log_probs: bool = False,
    score_dtype: torch.dtype | None = torch.float32,
    missed_ties: list[Tensor] | None = None,
) -> Iterator[Beams]:
    """The same search, round by round: round l yields the beams that a search with draft_len l returns."""
    shape.check()
    embed = embedding if callable(embedding) else _lookup(embedding)
    head = head or draft_head(_require_drafter(drafter))
    tokens = first_token.to(torch.int64).view(-1, 1, 1)  # [B, rows, j]; one row until beams differ
    state = torch.zeros_like(context).unsqueeze(1)
    scores = _start_scores(shape, context, score_dtype or context.dtype)
    paths = torch.zeros_like(scores).unsqueeze(-1)
    history: Tensor | None = None
    for _ in range(shape.draft_len):
        state = drafter.next_state(state, embed(tokens[..., -1]))  # [B, rows, H]
        logits = head.project(drafter.features(context.unsqueeze(1).expand_as(state), state))
        logits = logits if score_dtype is None else logits.to(score_dtype)
        found = _candidates(logits, head.vocab_size, missed_ties)
        width = found.columns.shape[-1]
        total = scores.unsqueeze(-1) + found.log_probs  # [B, K, C]
        scores, flat = _best(total.flatten(1), shape.num_beams)
        parents = flat.div(width, rounding_mode="floor")
        rows = parents if state.shape[1] > 1 else torch.zeros_like(parents)
        chosen = _pick(found.columns, rows).gather(-1, (flat - parents * width).unsqueeze(-1))
        chosen = chosen if head.rows is None else head.rows[chosen]
        if keep_log_probs:
            log_probs = _pick(_full_log_probs(logits, found, head), rows).unsqueeze(2)
            history = log_probs if history is None else torch.cat([_pick(history, parents), log_probs], dim=2)
        tokens = torch.cat([_pick(tokens, rows), chosen], dim=-1)
        paths = torch.cat([_pick(paths, parents), scores.unsqueeze(-1)], dim=-1)
        state = _pick(state, rows)
        yield Beams(tokens, paths, history)


def _lookup(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda token_ids: F.embedding(token_ids, weight)


def _require_drafter(drafter: DraftModel) -> Drafter:
    if not isinstance(drafter, Drafter):
        raise TypeError("a drafter of another class needs its `head` passed")
    return drafter
