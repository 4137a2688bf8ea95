"""What a drafter is trained on: rows of (base hidden state, the token it led to), text after text.

Row r of a text holds the base model's state *before* answer token r, and that token. So row 0 stands at the prompt's
end, and a text of m answer tokens has m rows. Windows of S rows (and L more to look ahead) are cut from the long
row list wherever they fall; a mask keeps targets inside their text:

    rows      0  1  2 | 3  4        two texts, of 3 and 2 tokens
    position 1 at row 1 is scored against row 2; at row 2 against nothing (row 3 is another text)

Prompt tokens have no rows at all, so no loss can fall on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingRows:
    """hidden [N, H], tokens [N], document [N] (the text each row belongs to). On a device or memory-mapped."""

    hidden: Tensor
    tokens: Tensor
    document: Tensor

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def starts(self) -> list[int]:
        """First row of every text."""
        changed = torch.ones(len(self), dtype=torch.bool, device=self.document.device)
        changed[1:] = self.document[1:] != self.document[:-1]
        return [int(i) for i in changed.nonzero().flatten()]

    @classmethod
    def join(cls, texts: Sequence[tuple[Tensor, Tensor]]) -> TrainingRows:
        """From (hidden [m, H], tokens [m]) per text."""
        lengths = torch.tensor([tokens.shape[0] for _, tokens in texts])
        document = torch.repeat_interleave(torch.arange(len(texts)), lengths).to(texts[0][1].device)
        return cls(torch.cat([h for h, _ in texts]), torch.cat([t for _, t in texts]), document)


@dataclass(frozen=True)
class WindowBatch:
    """hidden [W, S + L, H], tokens [W, S + L], valid [W, L, S]: may row i + j teach position j of row i?"""

    hidden: Tensor
    tokens: Tensor
    valid: Tensor


def cut_windows(rows: TrainingRows, starts: Tensor, window: int, draft_len: int) -> WindowBatch:
    """Windows of `window` rows beginning at `starts` [W]; rows before the first and after the last are padding."""
    index, _ = _window_index(rows, starts, window + draft_len)
    tokens, valid = cut_targets(rows, starts, window, draft_len)
    return WindowBatch(rows.hidden[index.clamp(0, len(rows) - 1)], tokens, valid)


def cut_targets(rows: TrainingRows, starts: Tensor, window: int, draft_len: int) -> tuple[Tensor, Tensor]:
    """`tokens` and `valid` of these windows, without touching the hidden states."""
    index, inside = _window_index(rows, starts, window + draft_len)
    index = index.clamp(0, len(rows) - 1)
    document = rows.document[index].masked_fill(~inside, -1)
    here = document[:, :window]
    ahead = torch.stack([document[:, j : j + window] for j in range(1, draft_len + 1)], dim=1)
    return rows.tokens[index].long(), (ahead == here.unsqueeze(1)) & (here >= 0).unsqueeze(1)


def _window_index(rows: TrainingRows, starts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Row numbers [W, width], and whether they exist."""
    index = starts.to(rows.tokens.device).unsqueeze(1) + torch.arange(width, device=rows.tokens.device)
    return index, (index >= 0) & (index < len(rows))


@dataclass(frozen=True)
class WindowOrder:
    """Which windows a step sees: every row once per epoch, in an order that only the seed and the step decide."""

    total_rows: int
    window: int
    batch: int
    seed: int

    @property
    def windows_per_epoch(self) -> int:
        # One more than fits, so that every row is inside for any offset of the grid.
        return -(-(self.total_rows + self.window - 1) // self.window)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.windows_per_epoch // self.batch)

    def starts(self, step: int) -> Tensor:
        """First rows of the step's windows [batch]; negative ones begin before the first row."""
        epoch, position = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        offset = int(torch.randint(self.window, (1,), generator=generator))
        order = torch.randperm(self.windows_per_epoch, generator=generator)
        chosen = order[position * self.batch : (position + 1) * self.batch]
        if chosen.numel() < self.batch:  # the last batch is filled up from the epoch's beginning: equal shapes
            chosen = torch.cat([chosen, order.repeat(self.batch)[: self.batch - chosen.numel()]])
        return chosen * self.window - offset
