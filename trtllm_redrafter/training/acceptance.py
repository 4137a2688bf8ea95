"""How many tokens a step will emit, without decoding: acceptance measured along recorded trajectories.

Under greedy decoding the base model writes the same text whatever the drafter proposes. So each prompt is decoded
once, its hidden states and tokens kept (as `TrainingRows`), and the drafter then proposes from every row in large
batches. A setting's accepted length at a row is the longest beam prefix that the text continues with. From that,

    acceptance length   over row 0, then on by accepted + 1 tokens each step: exactly the steps that decoding takes
    mean over rows      the same over every row: nearly the same number, with less noise

One search with K beams serves every draft length: its beams after l rounds are those of the K x l setting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.backends.requests import acceptance_length
from trtllm_redrafter.errors import not_finite
from trtllm_redrafter.progress import Progress, no_progress
from trtllm_redrafter.redrafter.beam_search import DraftHead, search_rounds
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.training.model import TrainableDrafter
from trtllm_redrafter.training.rows import TrainingRows, cut_windows
from trtllm_redrafter.training.trainer import BaseTensors


@dataclass(frozen=True)
class Acceptance:
    """One setting's figures."""

    shape: DraftShape
    acceptance_length: float
    low: float
    high: float
    """With `low`, the 95 % interval of the acceptance length."""
    mean_over_rows: float
    steps: int
    acceptance_rate_per_position: list[float]
    """[j]: share of the steps that accept at least j + 1 drafts."""
    per_category: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        return {
            "setting": self.shape.name,
            "acceptance_length": round(self.acceptance_length, 4),
            "interval_95": [round(self.low, 4), round(self.high, 4)],
            "mean_over_rows": round(self.mean_over_rows, 4),
            "steps": self.steps,
            "acceptance_rate_per_position": [round(x, 4) for x in self.acceptance_rate_per_position],
            "per_category": {name: round(x, 4) for name, x in self.per_category.items()},
        }


class _Searched:
    """`TrainableDrafter` as the beam search sees it."""

    def __init__(self, model: TrainableDrafter) -> None:
        self._model = model

    def next_state(self, state: Tensor, embedding: Tensor) -> Tensor:
        return self._model.core.next_state(state, embedding)

    def features(self, context: Tensor, state: Tensor) -> Tensor:
        return self._model.project(context, state)


def borrowed_head(model: TrainableDrafter, base_head: Tensor, rows: Tensor | None = None) -> DraftHead:
    """The drafter's head over the whole vocabulary or some token ids."""
    weight = model.head_of(base_head)
    vocab_size = weight.shape[0]
    if rows is not None:
        rows = rows.to(device=weight.device, dtype=torch.int64).sort().values
        weight = weight[rows].contiguous()
    return DraftHead(lambda features: F.linear(features, weight), vocab_size, rows)


@torch.no_grad()
def accepted_everywhere(
    model: TrainableDrafter,
    base: BaseTensors,
    rows: TrainingRows,
    shape: DraftShape,
    *,
    head: DraftHead,
    batch: int,
    progress: Progress = no_progress,
) -> Tensor:
    """Drafts accepted if a step began at each row, for every length up to the shape's: [L, N].

    The row's own token is the guaranteed one. Entry [l - 1] is that of the setting with draft_len l. Raises
    `NumericalError` where the drafter's scores are not finite.
    """
    found = []
    for start in range(0, len(rows), batch):
        index = torch.arange(start, min(start + batch, len(rows)), device=rows.tokens.device)
        window = cut_windows(rows, index, 1, shape.draft_len)
        tokens, valid = window.tokens.to(base.head.device), window.valid[:, :, 0].to(base.head.device)
        context = rows.hidden[index].to(base.head.device, base.head.dtype)
        lengths = []
        for beams in search_rounds(_Searched(model), base.embedding, context, tokens[:, 0], shape, head=head):
            drafts = beams.tokens[:, :, 1:]
            length = drafts.shape[-1]
            same = (drafts == tokens[:, None, 1 : length + 1]) & valid[:, None, :length]
            lengths.append(same.long().cumprod(dim=-1).sum(dim=-1).amax(dim=-1))
            finite = beams.finite
        found.append(torch.stack(lengths).cpu())
        if not bool(finite.all()):
            raise not_finite("the drafter's scores", context.dtype, where="drafter")
        progress(f"draft with {shape.num_beams} beams", start + len(index), len(rows), "positions")
    return torch.cat(found, dim=1)


def accepted_per_step(accepted: Sequence[int]) -> list[int]:
    """How many drafts each decoding step of one text accepts; a step at row i leads to row i + accepted + 1.

    A step that accepts all the rest would also emit a token beyond the recorded text; decoding with this limit drops
    it, so it is not counted.
    """
    steps, row, last = [], 0, len(accepted) - 1
    while row < last:  # the last row's token is out already: nothing is left to decode
        steps.append(min(int(accepted[row]), last - row - 1))
        row += steps[-1] + 1
    return steps


def summarize(
    accepted: Tensor, rows: TrainingRows, shape: DraftShape, categories: Sequence[str] | None = None
) -> Acceptance:
    """Both means, and the 95 % interval of the acceptance length from the spread between texts (ratio estimator)."""
    bounds = [*rows.starts, len(rows)]
    texts = [accepted_per_step(accepted[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    scored = torch.ones(len(rows), dtype=torch.bool)
    scored[torch.tensor(bounds[1:]) - 1] = False  # no step begins at a text's last row
    over_rows = 1.0 + float(accepted[scored].float().mean())
    steps, mean = sum(map(len, texts)), _mean(texts)
    half = 1.96 * _ratio_error(texts, mean)
    rates = [sum(n > j for text in texts for n in text) / max(1, steps) for j in range(shape.draft_len)]
    groups: dict[str, list[list[int]]] = {}
    for name, text in zip(categories or [], texts, strict=categories is not None):
        groups.setdefault(name, []).append(text)
    per_category = {name: _mean(group) for name, group in groups.items()}
    return Acceptance(shape, mean, mean - half, mean + half, over_rows, steps, rates, per_category)


def _mean(texts: Sequence[Sequence[int]]) -> float:
    """Acceptance length over the steps of all texts; 0 without a step."""
    return acceptance_length(sum(map(len, texts)), sum(map(sum, texts))) or 0.0


def _ratio_error(texts: Sequence[Sequence[int]], mean: float) -> float:
    """Standard error of the mean over steps, with texts as the unit of sampling."""
    n, steps = len(texts), sum(map(len, texts))
    if n < 2 or steps == 0:
        return 0.0
    spread = sum((len(text) + sum(text) - mean * len(text)) ** 2 for text in texts)
    return math.sqrt(spread * n / (n - 1)) / steps


def evaluate_grid(
    model: TrainableDrafter,
    base: BaseTensors,
    rows: TrainingRows,
    grid: Sequence[DraftShape],
    *,
    head: DraftHead,
    batch: int,
    categories: Sequence[str] | None,
    progress: Progress,
) -> list[Acceptance]:
    """Every setting of the grid on the same trajectories; one search per number of beams."""
    longest: dict[int, int] = {}
    for shape in grid:
        longest[shape.num_beams] = max(shape.draft_len, longest.get(shape.num_beams, 0))
    accepted = {
        beams: accepted_everywhere(
            model, base, rows, DraftShape(beams, length), head=head, batch=batch, progress=progress
        )
        for beams, length in longest.items()
    }
    return [summarize(accepted[s.num_beams][s.draft_len - 1], rows, s, categories) for s in grid]


@torch.no_grad()
def token_accuracy(
    model: TrainableDrafter, base: BaseTensors, rows: TrainingRows, *, head: DraftHead, batch: int
) -> list[dict[str, float]]:
    """Teacher-forced top-1 and top-5 accuracy of every future position over all rows."""
    length = model.spec.draft_len
    hits = torch.zeros(length, 3, dtype=torch.float64)
    for start in range(0, len(rows), batch):
        index = torch.arange(start, min(start + batch, len(rows)), device=rows.tokens.device)
        window = cut_windows(rows, index, 1, length)
        tokens = window.tokens.to(base.head.device)
        context = rows.hidden[index].unsqueeze(1).to(base.head.device, base.head.dtype)
        features = model(context, base.embedding[tokens])[:, :, 0]  # [n, L, D]
        for j in range(length):
            top = head.project(features[:, j]).topk(5, dim=-1).indices
            top = top if head.rows is None else head.rows[top]
            valid = window.valid[:, j, 0].to(base.head.device)
            right = (top == tokens[:, j + 1, None]) & valid.unsqueeze(1)
            hits[j] += torch.stack([right[:, 0].sum(), right.any(dim=1).sum(), valid.sum()]).double().cpu()
    return [{"top1": float(a / n), "top5": float(b / n)} for a, b, n in hits.clamp(min=1e-9).tolist()]
