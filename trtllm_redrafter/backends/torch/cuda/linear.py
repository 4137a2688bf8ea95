"""Matrix products of few rows that read every weight once: launches `linear.cu`.

    product = Linear(weight, kind="partial", multiprocessors=132)
    product(x, rows, out)            # captured into a graph with everything else
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.cuda.compiler import compiled, pointer, tensor_map

Kind = Literal["partial", "gated", "logits"]

EVICT_FIRST, EVICT_LAST = 0x12F0000000000000, 0x14F0000000000000
_BOX = 64  # columns of a box: 128 bytes
_SHARED = 100 << 10
"""Bytes a block takes, so that the next kernel's blocks fit beside it and can ask for their weights."""
_SHARED_WIDE = 200 << 10


class _Work(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("tiles", "k_tiles", "splits", "rows", "width")]


def padded(rows: int) -> int:
    """Rows that a kernel is compiled for: as the tensor cores take them."""
    for step in (8, 16, 32, 48, 64, 96, 128, 160, 208, 256):
        if rows <= step:
            return step
    raise ValueError(f"{rows} rows in one product, at most 256")


class Linear:
    """One weight [M, K], 16 bits, and how its product is cut.

    For "gated" the weight is [2 I, K]: gate rows, then up rows.
    """

    def __init__(self, weight: Tensor, kind: Kind, multiprocessors: int, *, streamed: bool = True) -> None:
        self.weight, self.kind, self._count = weight, kind, multiprocessors
        self._policy = ctypes.c_uint64(EVICT_FIRST if streamed else EVICT_LAST)
        self.width, self.columns = weight.shape
        self.k_tiles = -(-self.columns // _BOX)
        tiles = -(-self.width // 64)
        self.splits = 1 if kind != "partial" else max(1, min(self.k_tiles, multiprocessors // tiles))
        self._maps: dict[int, Any] = {}
        self._inputs: dict[tuple[int, int, int], Any] = {}

    def blocks(self, rows: int) -> int:
        """How many blocks a product of so many rows is given; per block "logits" writes its largest."""
        return min(self._count, -(-self.width // (64 * self._groups(rows))) * self.splits)

    def _groups(self, rows: int) -> int:
        return 1 if padded(rows) <= 64 else 2

    def __call__(self, x: Tensor, rows: int, out: Tensor, best: tuple[Tensor, Tensor] | None = None) -> None:
        """x [>= rows, K] -> out; see `linear.cu` for its form."""
        size, groups = padded(rows), self._groups(rows)
        stage = (64 * groups + size) * 2 * _BOX
        shared = _SHARED if groups == 1 else _SHARED_WIDE
        stages = max(2, min((shared - 1024) // stage, 32))
        constants: dict[str, int | None] = {
            "ROWS": size, "GROUPS": groups, "STAGES": stages, self.kind.upper(): None
        }  # fmt: skip
        if self.weight.dtype == torch.float16:
            constants["DTYPE_HALF"] = None
        kernel = compiled("linear.cu", "linear", constants, rows=size, shared_bytes=stages * stage + 1024)
        tiles = -(-self.width // (64 * groups))
        work = _Work(tiles, self.k_tiles, self.splits, rows, self.width)
        values, places = (None, None) if best is None else best
        kernel.launch(
            (self.blocks(rows),),
            128 * groups + 32,
            [self._weight_map(groups), self._input_map(x, size), work, pointer(out), pointer(values), pointer(places),
             self._policy],
        )  # fmt: skip

    def _weight_map(self, groups: int) -> Any:
        if groups not in self._maps:
            row = 2 * self.columns
            if self.kind == "gated":  # eight gate rows, then the eight up rows of the same places
                half = self.width // 2
                sizes, strides = [self.columns, 8, 2, half // 8], [row, half * row, 8 * row]
                self._maps[groups] = tensor_map(self.weight, sizes, strides, [_BOX, 8, 2, 4 * groups])
            else:
                self._maps[groups] = tensor_map(self.weight, [self.columns, self.width], [row], [_BOX, 64 * groups])
        return self._maps[groups]

    def _input_map(self, x: Tensor, size: int) -> Any:
        key = (x.data_ptr(), x.shape[0], size)
        if key not in self._inputs:
            self._inputs[key] = tensor_map(x, [self.columns, x.shape[0]], [2 * x.stride(0)], [_BOX, size])
        return self._inputs[key]
