"""Matrix products of few rows that read every weight once: launches `linear.cu`.

    product = Linear(weight, "partial", multiprocessors=132)
    product(x, rows, out)            # captured into a graph with everything else
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.cuda.compiler import compiled, pointer, tensor_map

Kind = Literal["partial", "gated", "logits"]

EVICT_FIRST, EVICT_LAST = 0x12F0000000000000, 0x14F0000000000000
_BOX = 64  # columns of a box: 128 bytes
_GROUP = 16  # rows of a weight that are dealt out together
_MOST_GROUPS = 16  # of a pass: TMA cuts boxes of at most 256 rows
_SHARED = 100 << 10
"""Bytes a block takes, so that the next kernel's blocks fit beside it and can ask for their weights."""
_SHARED_WIDE = 200 << 10
_SLACK = 9 << 10
"""Of them for alignment and for what a block's last, partly empty tile reads beyond its boxes."""
_WIDE = 64
"""With more rows a product is bound by arithmetic too, and blocks take the whole multiprocessor."""
_SMALL_BOX = 4
"""A box of fewer groups takes no less time: handing it over takes longer than reading it."""
_SPLIT_COST = 2
"""What adding one more partial result costs, in boxes of one group (2 KiB)."""


class _Work(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("groups", "parts", "k_tiles", "splits", "passes", "rows", "width")]


class _Ahead(ctypes.Structure):
    _fields_ = [("work", _Work)] + [(n, ctypes.c_int) for n in ("box_groups", "skip", "count", "gated")]


@dataclass(frozen=True)
class _Form:
    """Compile-time sizes of a product for so many rows."""

    size: int  # rows, padded
    passes: int
    groups: int  # of a pass
    teams: int
    stages: int
    stage_bytes: int


def padded(rows: int) -> int:
    """Rows that a kernel is compiled for: as the tensor cores take them."""
    for step in (8, 16, 24, 32, 48, 64, 96, 128, 160, 208, 256):
        if rows <= step:
            return step
    raise ValueError(f"{rows} rows in one product, at most 256")


def _cut(groups: int, k_tiles: int, blocks: int, most_splits: int) -> tuple[int, int]:
    """Shares of rows and ranges of columns that give each of `blocks` blocks nearly the same to read."""
    best, found = None, (1, 1)
    for splits in range(1, min(most_splits, k_tiles, blocks) + 1):
        parts = min(groups, blocks // splits)
        cost = max(-(-groups // parts), _SMALL_BOX) * -(-k_tiles // splits) + _SPLIT_COST * splits
        if best is None or cost < best:
            best, found = cost, (parts, splits)
    return found


class Linear:
    """One weight [M, K], 16 bits, and how its product is cut.

    For "gated" the weight is [2 I, K]: gate rows, then up rows.
    """

    def __init__(self, weight: Tensor, kind: Kind, multiprocessors: int, *, streamed: bool = True) -> None:
        self.weight, self.kind = weight, kind
        self._policy = ctypes.c_uint64(EVICT_FIRST if streamed else EVICT_LAST)
        self.width, self.columns = weight.shape
        self.k_tiles = -(-self.columns // _BOX)
        self._groups = -(-self.width // _GROUP)
        self.parts, self.splits = _cut(self._groups, self.k_tiles, multiprocessors, 16 if kind == "partial" else 1)
        self._maps: dict[int, Any] = {}
        self._inputs: dict[tuple[int, int, int], Any] = {}

    @property
    def blocks(self) -> int:
        """Blocks of threads; per block "logits" writes its largest."""
        return self.parts * self.splits

    def __call__(
        self,
        x: Tensor,
        rows: int,
        out: Tensor,
        best: tuple[Tensor, Tensor] | None = None,
        ahead: tuple[Linear, int, int] | None = None,
    ) -> None:
        """x [>= rows, K] -> out; see `linear.cu` for its form.

        `ahead`: a product to come, whose weights the L2 cache gets bytes `from` to `to` of, counted per block and behind
        what the product itself asks for before its turn.
        """
        form = self._form(rows)
        constants: dict[str, int | None] = {
            "ROWS": form.size, "GROUPS": form.groups, "TEAMS": form.teams, "STAGES": form.stages, self.kind.upper(): None
        }  # fmt: skip
        if self.weight.dtype == torch.float16:
            constants["DTYPE_HALF"] = None
        shared = form.stages * form.stage_bytes + _SLACK
        kernel = compiled("linear.cu", "linear", constants, rows=form.size, shared_bytes=shared)
        values, places = (None, None) if best is None else best
        after, maps = _Ahead(), self._weight_maps(form.groups)
        later = maps
        if ahead is not None:
            other, start, end = ahead
            its = other._form(rows)
            box = its.groups * _GROUP * 2 * _BOX
            later = other._weight_maps(its.groups)
            after = _Ahead(
                other._work(its, rows), its.groups, its.stages + start // box, -(-(end - start) // box), other.kind == "gated"
            )
        kernel.launch(
            (self.blocks,), 128 * form.teams + 32,
            [*maps, self._input_map(x, form.size), self._work(form, rows), pointer(out), pointer(values), pointer(places),
             self._policy, *later, after],
        )  # fmt: skip

    def _form(self, rows: int) -> _Form:
        """How a block of threads works through its share."""
        size = padded(rows)
        wide = size > _WIDE
        share = -(-self._groups // self.parts)
        # Few rows of x leave registers for many rows of w; with many, a warpgroup takes one tile.
        most = 8 if wide else min(_MOST_GROUPS, 4 * max(1, 128 // size))
        passes = -(-share // most)
        groups = -(-share // passes)
        teams = min(2, -(-groups // 4)) if wide else 1
        stage = -(-(groups * _GROUP + size) * 2 * _BOX // 1024) * 1024
        stages = max(2, min(((_SHARED_WIDE if wide else _SHARED) - _SLACK) // stage, 24))
        return _Form(size, passes, groups, teams, stages, stage)

    def _work(self, form: _Form, rows: int) -> _Work:
        return _Work(self._groups, self.parts, self.k_tiles, self.splits, form.passes, rows, self.width)

    def _weight_maps(self, groups: int) -> tuple[Any, Any]:
        return self._weight_map(groups), self._weight_map(max(1, groups - 1))

    def _weight_map(self, groups: int) -> Any:
        if groups not in self._maps:
            row = 2 * self.columns
            if self.kind == "gated":  # eight gate rows, then the eight up rows of the same places
                half = self.width // 2
                sizes, strides = [self.columns, 8, 2, half // 8], [row, half * row, 8 * row]
                self._maps[groups] = tensor_map(self.weight, sizes, strides, [_BOX, 8, 2, groups])
            else:
                box = [_BOX, _GROUP * groups]
                self._maps[groups] = tensor_map(self.weight, [self.columns, self.width], [row], box)
        return self._maps[groups]

    def _input_map(self, x: Tensor, size: int) -> Any:
        key = (x.data_ptr(), x.shape[0], size)
        if key not in self._inputs:
            self._inputs[key] = tensor_map(x, [self.columns, x.shape[0]], [2 * x.stride(0)], [_BOX, size])
        return self._inputs[key]
