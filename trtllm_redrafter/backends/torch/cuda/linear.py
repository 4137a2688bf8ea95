"""Matrix products of few rows that read every weight once: launches `linear.cu`.

product = Linear(weight, "partial", multiprocessors=132)
product(x, rows, out)            # captured into a graph with everything else
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, Literal

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.cuda.compiler import compiled, pointer, tensor_map

Kind = Literal["partial", "gated", "logits"]

EVICT_FIRST, EVICT_LAST = 0x12F0000000000000, 0x14F0000000000000
_BOX = 64  # columns of a box: 128 bytes
_GROUP = 16  # rows of a weight that are dealt out together
_MOST_GROUPS = 9  # of a pass
LARGE, SMALL = 124 << 10, 96 << 10
"""Bytes of shared memory that a block takes. Products take them in turn: a block and one of the next product, which
asks for its weights meanwhile, fit one multiprocessor; two large ones do not, since two blocks of one product would
share a multiprocessor's bandwidth while another has none."""
_SHARED_WIDE = 200 << 10
_WIDE = 64
"""With more rows a product is bound by arithmetic too: a block takes the whole multiprocessor, and two warpgroups half
of the rows each."""
_SMALL_BOX = 4
"""A box of fewer groups takes no less time: handing it over takes longer than reading it."""
_SPLIT_COST = 2
"""What adding one more partial result costs, in boxes of one group (2 KiB)."""


class _Work(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("groups", "parts", "k_tiles", "splits", "passes", "rows", "width")]


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
    """One weight [M, K], 16 bits, in the order its product reads it.

    For "gated" the weight is [2 I, K]: gate rows, then up rows.
    """

    def __init__(
        self, weight: Tensor, kind: Kind, multiprocessors: int, *, shared: int = LARGE, streamed: bool = True
    ) -> None:
        """`shared`: LARGE and SMALL in turn, from product to product."""
        self.kind, self._shared = kind, shared
        self._policy = ctypes.c_uint64(EVICT_FIRST if streamed else EVICT_LAST)
        self.width, self.columns = weight.shape
        self.k_tiles = -(-self.columns // _BOX)
        self._groups = -(-self.width // _GROUP)
        self.parts, self.splits = _cut(self._groups, self.k_tiles, multiprocessors, 16 if kind == "partial" else 1)
        share = math.ceil(self._groups / self.parts)
        self.passes = math.ceil(share / _MOST_GROUPS)
        self._pass_groups = math.ceil(share / self.passes)
        self.packed = self._pack(weight)
        self._inputs: dict[tuple[int, int, int], Any] = {}

    @property
    def blocks(self) -> int:
        """Blocks of threads; per block "logits" writes its largest."""
        return self.parts * self.splits

    def __call__(self, x: Tensor, rows: int, out: Tensor, best: tuple[Tensor, Tensor] | None = None) -> None:
        """x [>= rows, K] -> out; see `linear.cu` for its form."""
        size = padded(rows)
        wide = size > _WIDE
        groups = self._pass_groups
        teams = 2 if wide else 1
        stage = -(-(groups * _GROUP + size) * 2 * _BOX // 1024) * 1024
        boxes = self.passes * -(-self.k_tiles // self.splits)  # of a block
        slack = 1024 + max(0, -(-groups // 4) * 64 * 2 * _BOX - stage)  # alignment, and what a partly empty tile reads
        shared = _SHARED_WIDE if wide else self._shared
        stages = max(2, min((shared - slack) // stage, boxes, 24))
        constants: dict[str, int | None] = {
            "ROWS": size, "GROUPS": groups, "TEAMS": teams, "STAGES": stages,
            self.kind.upper(): None,
        }  # fmt: skip
        if self.packed.dtype == torch.float16:
            constants["DTYPE_HALF"] = None
        kernel = compiled(
            "linear.cu", "linear", constants, rows=size // teams, shared_bytes=max(shared, stages * stage + slack)
        )
        work = _Work(self._groups, self.parts, self.k_tiles, self.splits, self.passes, rows, self.width)
        values, places = (None, None) if best is None else best
        kernel.launch(
            (self.blocks,), 128 * teams + (128 if wide else 32),
            [pointer(self.packed), self._input_map(x, size), work, pointer(out), pointer(values), pointer(places),
             self._policy],
        )  # fmt: skip

    def _input_map(self, x: Tensor, size: int) -> Any:
        key = (x.data_ptr(), x.shape[0], size)
        if key not in self._inputs:
            self._inputs[key] = tensor_map(x, [self.columns, x.shape[0]], [2 * x.stride(0)], [_BOX, size])
        return self._inputs[key]

    def _pack(self, weight: Tensor) -> Tensor:
        """[groups, k_tiles, 16, 64] in the order of passes, each row's 16-byte pieces swizzled; padded with zeros."""
        whole = weight.new_zeros(self._groups * _GROUP, self.k_tiles * _BOX)
        if self.kind == "gated":
            gate, up = weight.chunk(2)
            pairs = whole.view(-1, 2, 8, whole.shape[1])
            eights = len(gate) // 8
            pairs[:eights, 0, :, : self.columns] = gate.view(eights, 8, -1)
            pairs[:eights, 1, :, : self.columns] = up.view(eights, 8, -1)
        else:
            whole[: self.width, : self.columns] = weight
        tiles = whole.view(self._groups, _GROUP, self.k_tiles, 8, 8)
        row = torch.arange(_GROUP, device=weight.device).view(-1, 1)
        piece = torch.arange(8, device=weight.device) ^ (row & 7)  # [16, 8]: where a piece comes from
        swizzled = torch.gather(tiles, 3, piece.view(1, _GROUP, 1, 8, 1).expand(tiles.shape))
        swizzled = swizzled.permute(0, 2, 1, 3, 4).reshape(self._groups, self.k_tiles, _GROUP, _BOX)
        packed = swizzled.new_empty(swizzled.shape)
        for part in range(self.parts):
            begin = part * self._groups // self.parts
            count = (part + 1) * self._groups // self.parts - begin
            for number in range(self.passes):
                a, b = begin + number * count // self.passes, begin + (number + 1) * count // self.passes
                packed[a:b].view(self.k_tiles, b - a, _GROUP, _BOX).copy_(swizzled[a:b].transpose(0, 1))
        return packed
