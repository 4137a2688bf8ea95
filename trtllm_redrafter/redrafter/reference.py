"""The algorithm's definition on tensors, for a batch: trees, and which of their tokens the base model accepts.

Runners compute the same with plain lists (`token_tree.Tree`), kernels and one draw per node; this module is what they
are tested against, what TensorRT-LLM's golden vectors test, and what the parity gate replays engines with. Trees are
numbered as in `token_tree`; slots past a sequence's last node are padding: token 0, parent -1, depth 0, attending only
to themselves. Two rules decide what is accepted, by name.

`exact` walks the tree with draws from the base model's own distribution: draw a token at the root; if it is one of the
root's children, accept that child and draw there; else stop. The drawn tokens are those a plain sampler with the same
uniform numbers emits, one after the other, for every temperature, top-k and top-p; drafts only decide how many of them
a step yields. No lossless rule accepts more. Greedy is the same walk with argmax as the draw.

`trtllm` is what TensorRT-LLM's graph does, for parity: accept draft t with probability p(t)/q(t), keep the longest
accepted run over beams, draw the next token from relu(p - q). With beam-search drafts its output is not distributed
as the base model's (it leans towards the drafter), except in greedy mode.

    tree  g ── 5 ── 9        draws 5 at g, 7 at "5", 1 at "7":  path g,5,7   emitted 5 7 1
               └─── 7        draws 8 at g:                      path g       emitted 8
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.config import CUT
from trtllm_redrafter.redrafter.sampling import SamplingSettings, draw, uniform
from trtllm_redrafter.redrafter.token_tree import ancestor_mask


@dataclass(frozen=True)
class TokenTree:
    """Trees of a batch, padded to the same T nodes."""

    tokens: Tensor  # [B, T] int64
    parents: Tensor  # [B, T] int64; -1 for the root and padding
    depths: Tensor  # [B, T] int64; the root is at 0
    mask: Tensor  # [B, T, T] bool; [b, i, j]: node i attends to node j
    draft_indices: Tensor  # [B, K, L+1] int64; node of each beam token, -1 if dropped by `max_nodes`
    lengths: Tensor  # [B] int64; number of nodes, root included

    @property
    def width(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def is_node(self) -> Tensor:
        """[B, T] bool; False for padding."""
        return torch.arange(self.width, device=self.lengths.device) < self.lengths.unsqueeze(1)


def build_tree(beams: Beams, *, max_nodes: int | Tensor | None = None, width: int | None = None) -> TokenTree:
    """Merge common prefixes of `beams`.

    `max_nodes` (one number, or [B]) keeps the root and the likeliest nodes by path score; 1 keeps the root alone. A
    path never gets likelier by growing, so a kept node's parent is kept too. `width` is T; by default that of the
    largest tree, 1 for an empty batch.
    """
    tokens = beams.tokens
    num_beams, length = tokens.shape[1:]
    holder = _first_holder(tokens)  # [B, K, L+1]
    is_node = holder == torch.arange(num_beams, device=tokens.device).view(1, -1, 1)
    if max_nodes is not None:
        is_node = _likeliest(is_node, beams.path_scores, max_nodes)
    flat = is_node.flatten(1)
    numbers = (flat.cumsum(1) - 1).masked_fill(~flat, -1).view_as(holder)
    draft_indices = numbers.gather(1, holder)
    lengths = flat.sum(1)
    if width is None:
        width = int(lengths.max()) if len(lengths) else 1
    parents = F.pad(draft_indices[..., :-1], (1, 0), value=-1)
    depths = torch.arange(length, device=tokens.device).expand_as(tokens)
    parents = _scatter(parents, numbers, width, fill=-1)
    return TokenTree(
        tokens=_scatter(tokens, numbers, width, fill=0),
        parents=parents,
        depths=_scatter(depths, numbers, width, fill=0),
        mask=ancestor_mask(parents, length - 1),
        draft_indices=draft_indices,
        lengths=lengths,
    )


def _first_holder(tokens: Tensor) -> Tensor:
    """[B, K, L+1]: the lowest beam with the same tokens up to each position."""
    same = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).cumprod(dim=-1)  # [B, k, other, L+1]
    return same.argmax(dim=2)


def _likeliest(is_node: Tensor, path_scores: Tensor, max_nodes: int | Tensor) -> Tensor:
    """Keep the `max_nodes` best nodes of each sequence; of equal scores, the lower number."""
    scores = path_scores.masked_fill(~is_node, -torch.inf).flatten(1)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    limit = max_nodes.view(-1, 1) if isinstance(max_nodes, Tensor) else max_nodes
    return is_node & (rank < limit).view_as(is_node)


def _scatter(values: Tensor, numbers: Tensor, width: int, *, fill: int) -> Tensor:
    """Put each node's value at its number: [B, K, L+1] -> [B, width]. Tokens that are not nodes are dropped."""
    out = torch.full((values.shape[0], width + 1), fill, dtype=torch.int64, device=values.device)
    place = numbers.flatten(1)
    out.scatter_(1, torch.where(place < 0, width, place), values.flatten(1))
    return out[:, :width]


@dataclass(frozen=True)
class VerifyOutput:
    """What one step yields, per sequence. D is the depth of the deepest node in the batch."""

    accepted: Tensor  # [B] int64; drafts accepted
    path: Tensor  # [B, D+1] int64; accepted nodes, root first; -1 past them
    emitted: Tensor  # [B, D+1] int64; accepted drafts, then the next token; -1 past them
    next_token: Tensor  # [B] int64; root of the next tree
    last_node: Tensor  # [B] int64; its hidden state is the drafter's next context


@dataclass(frozen=True)
class DraftRecord:
    """What only the `trtllm` rule needs: the drafts, the distributions they were taken from, and its random numbers."""

    tokens: Tensor  # [B, K, L+1]
    log_probs: Tensor  # [B, K, L, V]
    rand_validation: Tensor  # [B, K, L]
    rand_sample: Tensor  # [B]
    inverse_temperature: Tensor  # [B]; unused if greedy
    greedy: bool


@dataclass(frozen=True)
class VerifyInput:
    """What a rule decides about: one step of a batch."""

    tree: TokenTree
    logits: Tensor  # [B, T, V]; for the token after each node
    settings: SamplingSettings  # of B rows
    uniforms: Tensor | None  # [B, T], see `node_uniforms`; None if every request is greedy
    draft: DraftRecord | None = None


def node_uniforms(tree: TokenTree, seeds: ArrayLike, emitted: Tensor) -> Tensor:
    """[B, T]: the number each node's successor is drawn with. `emitted` [B] counts earlier output tokens and the root.

    The successor of a node at depth d is output position emitted + d, whichever branch the node is on.
    """
    positions = emitted.cpu().view(-1, 1) + tree.depths.cpu()
    return uniform(np.asarray(seeds).reshape(-1, 1), positions.numpy())


def exact(step: VerifyInput) -> VerifyOutput:
    """Walk the tree with the base model's own draws. Lossless; see the module's docstring."""
    batch, width, vocab = step.logits.shape
    settings = step.settings.repeat(width) if width > 1 else step.settings
    uniforms = None if step.uniforms is None else step.uniforms.reshape(-1)
    draws = draw(step.logits.reshape(batch * width, vocab), settings, uniforms)
    return walk(step.tree, draws.view(batch, width))


def walk(tree: TokenTree, draws: Tensor) -> VerifyOutput:
    """Follow `draws` [B, T], the token drawn at each node, from the root for as long as they are in the tree.

    A node is accepted if it and all its ancestors equal the draw at their parent. Siblings differ, so at most one
    node per depth is accepted.
    """
    drawn_at_parent = draws.gather(1, tree.parents.clamp(min=0))
    refused = tree.tokens != drawn_at_parent
    refused[:, 0] = False
    refused |= ~tree.is_node
    reached = ~(tree.mask & refused.unsqueeze(1)).any(dim=-1)  # [B, T]
    accepted = reached.sum(dim=1) - 1
    last_node = (reached * (tree.depths + 1)).argmax(dim=1)
    next_token = draws.gather(1, last_node.unsqueeze(1)).squeeze(1)
    return _output(tree, last_node, accepted, next_token)


def _output(tree: TokenTree, last_node: Tensor, accepted: Tensor, next_token: Tensor) -> VerifyOutput:
    """Read the path to `last_node` from the tree's mask."""
    width = tree.width
    deepest = int(tree.depths.max()) if tree.depths.numel() else 0
    on_path = tree.mask.gather(1, last_node.view(-1, 1, 1).expand(-1, 1, width)).squeeze(1)  # [B, T]
    place = torch.where(on_path, tree.depths, deepest + 1)
    path = torch.full((len(last_node), deepest + 2), -1, dtype=torch.int64, device=last_node.device)
    path.scatter_(1, place, torch.arange(width, device=last_node.device).expand_as(place))
    path = path[:, : deepest + 1]
    drafts = tree.tokens.gather(1, path.clamp(min=0)).masked_fill(path < 0, -1)
    emitted = F.pad(drafts[:, 1:], (0, 1), value=-1)
    emitted = emitted.scatter(1, accepted.unsqueeze(1), next_token.unsqueeze(1))
    return VerifyOutput(accepted, path, emitted, next_token, last_node)


@dataclass(frozen=True)
class TrtllmDecision:
    """Outcome of TensorRT-LLM's rule, before the next token is drawn."""

    accepted: Tensor  # [B] int64
    beam: Tensor  # [B] int64; lowest beam with the longest accepted run
    next_probs: Tensor  # [B, V]; for the next token, not normalised
    node: Tensor  # [B] int64; the last accepted node


def trtllm_decide(step: VerifyInput) -> TrtllmDecision:
    """Acceptance as in TensorRT-LLM's graph.

    Random numbers belong to (beam, position), so a node shared by several beams is tried several times.
    """
    draft, indices = _require_draft(step), step.tree.draft_indices
    logits = step.logits if draft.greedy else step.logits * draft.inverse_temperature.view(-1, 1, 1)
    log_probs = base_log_probs(logits, greedy=draft.greedy)
    batch, num_beams, length = draft.tokens.shape
    at_beams = log_probs.gather(1, indices.flatten(1).unsqueeze(-1).expand(-1, -1, log_probs.shape[-1]))
    at_beams = at_beams.view(batch, num_beams, length, log_probs.shape[-1])  # [B, K, L+1, V]
    drafted = draft.tokens[..., 1:, None]
    log_ratio = at_beams[:, :, :-1].gather(-1, drafted) - draft.log_probs.gather(-1, drafted)
    accept = draft.rand_validation < log_ratio.squeeze(-1).exp()
    runs = accept.long().cumprod(dim=-1).sum(dim=-1)  # [B, K]
    accepted = runs.amax(dim=1)
    beam = (runs == accepted.unsqueeze(1)).long().argmax(dim=1)
    row = torch.arange(batch, device=accepted.device)
    p = at_beams[row, beam, accepted].exp()
    q = draft.log_probs[row, beam, accepted.clamp(max=length - 2)].exp()
    residual = torch.where((accepted == length - 1).unsqueeze(1), p, F.relu(p - q))
    return TrtllmDecision(accepted, beam, residual, indices[row, beam, accepted])


def trtllm(step: VerifyInput) -> VerifyOutput:
    """TensorRT-LLM's rule in full: decide, draw, and return what was emitted."""
    draft = _require_draft(step)
    decision = trtllm_decide(step)
    next_token = trtllm_draw(decision.next_probs, draft.rand_sample)
    return _output(step.tree, decision.node, decision.accepted, next_token)


def base_log_probs(logits: Tensor, *, greedy: bool) -> Tensor:
    """log p; in greedy mode 0 at every maximum and CUT elsewhere, so two tied maxima each have "probability" 1."""
    log_probs = logits.log_softmax(dim=-1)
    if not greedy:
        return log_probs
    is_best = log_probs == log_probs.amax(dim=-1, keepdim=True)
    return torch.where(is_best, 0.0, CUT).to(log_probs)


def trtllm_draw(probs: Tensor, rand_sample: Tensor) -> Tensor:
    """First token whose cumulative probability reaches the random number; token 0 if none does."""
    cumulative = (probs / probs.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    return (cumulative >= rand_sample.unsqueeze(-1)).long().argmax(dim=-1)


def _require_draft(step: VerifyInput) -> DraftRecord:
    if step.draft is None:
        raise TypeError("the trtllm rule needs the draft's log-probabilities and random numbers")
    if bool((step.tree.draft_indices < 0).any()):
        raise ValueError("the trtllm rule needs every beam token in the tree; build it without max_nodes")
    return step.draft


RULES: dict[str, Callable[[VerifyInput], VerifyOutput]] = {"exact": exact, "trtllm": trtllm}
