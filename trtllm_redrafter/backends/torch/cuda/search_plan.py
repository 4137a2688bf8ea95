"""What the search kernel is compiled for: how matrices are cut into boxes, and shared memory. Needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_redrafter.backends.torch.cuda.compiler import SOURCES, cubin
from trtllm_redrafter.redrafter.config import TOP_CANDIDATES, DrafterConfig, DraftShape

BOX = 64
"""Columns of a box: 128 bytes."""

_SHARED = 227 << 10
_SHARED_STATIC = 1 << 10
_FEWEST_STAGES = 6
_MAX_CANDIDATES = 256
_MOST_ROWS = 96


@dataclass(frozen=True)
class Cut:
    """How a block's rows of a matrix are cut into boxes: tiles of `height` rows by `depth` times 64 columns."""

    tiles: int
    height: int
    depth: int

    @classmethod
    def of(cls, rows: int, columns: int, blocks: int, slot: int) -> Cut:
        own = -(-rows // blocks)
        tiles = -(-own // 16)
        height = -(-own // tiles)
        return cls(tiles, height, _even(columns // BOX, slot // (height * 128)))

    @property
    def rows(self) -> int:
        return self.tiles * self.height


def _even(count: int, limit: int) -> int:
    """The size of equal parts, none larger than `limit`, that `count` is cut into."""
    return -(-count // -(-count // min(limit, 256)))


@dataclass(frozen=True)
class SearchPlan:
    """Everything the kernel is compiled for: `batch` sequences at most."""

    config: DrafterConfig
    shape: DraftShape
    batch: int
    head_rows: int
    head_columns: int
    blocks: int
    half: bool

    @property
    def rows(self) -> int:
        return self.batch * self.shape.num_beams

    @property
    def factored(self) -> bool:
        return self.head_columns != self.config.exit_dim

    @property
    def groups(self) -> int:
        return -(-self.rows // 8)

    @property
    def warps(self) -> int:
        """That multiply. Columns are dealt out to them, so their number decides the order of sums."""
        return 11 if self.groups <= 5 else 7

    @property
    def head_depth(self) -> int:
        return _even(self.head_columns // BOX, 8)

    @property
    def slot(self) -> int:
        return self.head_depth * 2048

    def cut(self, rows: int, columns: int) -> Cut:
        return Cut.of(rows, columns, self.blocks, self.slot)

    @property
    def cuts(self) -> dict[str, Cut]:
        h, e = self.config.hidden_size, self.config.exit_dim
        return {
            "STATE": self.cut(h, h),
            "INPUT": self.cut(e, h),
            "EXIT": self.cut(e, e),
            "FACTOR": self.cut(self.head_columns, e),
        }

    @property
    def fixed_bytes(self) -> int:
        """Shared memory beside the ring; the kernel checks that it is enough."""
        beams, layers = self.shape.num_beams, max(1, self.config.num_layers)
        part = self.warps * 8 * self.groups * 20 * 4
        x = self.head_columns // 32 * self.groups * 512
        candidates = min(beams, 6) * (_MAX_CANDIDATES * 18 + 16)
        state, ends = self.cuts["STATE"].rows, self.cuts["EXIT"].rows
        floats = self.rows * (state + ends) + self.batch * ends + state + ends * (1 + layers)
        beam_bytes = 12 * self.rows * (1 + self.shape.draft_len)
        chosen = beams * beams * 8 + 16 + 6 * 9 * 4 + self.warps * 4
        warp_best = self.warps * 8 * self.groups * 2
        return -(-(max(part, x, candidates) + 4 * floats + beam_bytes + chosen + warp_best + 64) // 16) * 16

    @property
    def stages(self) -> int:
        return min(32, (_SHARED - _SHARED_STATIC - 1024 - self.fixed_bytes) // self.slot)

    @property
    def shared_bytes(self) -> int:
        return 1024 + self.stages * self.slot + self.fixed_bytes

    @property
    def pitch(self) -> int:
        """Tiles of 16 logits, a multiple of eight."""
        return -(-self.head_rows // 128) * 8

    def constants(self) -> dict[str, int | None]:
        config, cuts = self.config, self.cuts
        found: dict[str, int | None] = {
            "BATCH": self.batch, "BEAMS": self.shape.num_beams, "LENGTH": self.shape.draft_len,
            "HIDDEN": config.hidden_size, "EXIT": config.exit_dim, "LAYERS": config.num_layers,
            "WIDTH": self.head_rows, "HEAD_COLUMNS": self.head_columns, "HEAD_DEPTH": self.head_depth,
            "BLOCKS": self.blocks, "WARPS": self.warps, "STAGES": self.stages, "SLOT": self.slot,
            "SHARED_FIXED": self.fixed_bytes,
        }  # fmt: skip
        for name, cut in cuts.items():
            found |= {f"{name}_TILES": cut.tiles, f"{name}_HEIGHT": cut.height, f"{name}_DEPTH": cut.depth}
        flags = {
            "RECURRENT": config.rnn, "INPUT": config.has_input_proj, "FACTOR": self.factored, "DTYPE_HALF": self.half
        }  # fmt: skip
        return found | {name: None for name, wanted in flags.items() if wanted}

    def unsupported(self) -> str | None:
        """Why the kernel cannot do this, or None."""
        config, shape = self.config, self.shape
        sizes = {"hidden_size": config.hidden_size, "exit_dim": config.exit_dim, "the head's width": self.head_columns}
        odd = [f"{name} {size}" for name, size in sizes.items() if size % BOX]
        if odd:
            return f"{', '.join(odd)}: not a multiple of {BOX}"
        if min(self.head_rows, config.vocab_size - 1) < TOP_CANDIDATES:
            return f"{self.head_rows} head rows: fewer than the {TOP_CANDIDATES} that candidates are cut to"
        if self.head_rows > 1 << 20 or config.num_layers > 16 or shape.num_beams > 16:
            return "more than 1,048,576 head rows, 16 residual blocks or 16 beams"
        if self.rows > _MOST_ROWS:
            return f"{self.rows} rows, more than {_MOST_ROWS}"
        if self.stages < _FEWEST_STAGES:
            return f"{self.rows} rows of {self.head_columns} leave too little shared memory"
        return None

    def machine_code(self, architecture: str, extra: Mapping[str, int | None] | None = None) -> bytes:
        headers = {name: (SOURCES / name).read_text() for name in ("search_products.cuh", "selection.cuh")}
        return cubin("search.cu", {**self.constants(), **(extra or {})}, architecture, headers)
