"""The drafter's beam search as one CUDA kernel: launches `search.cu`.

    reason = SearchKernel.unsupported(drafter, head, shape, embedding.device)     # None: it can
    search = SearchKernel(drafter, embedding, head, shape, max_batch_size=4)
    tokens, path_scores = search(contexts, roots)        # on the device; captured into a graph with everything else
    search.search([context, ...], [root, ...])           # lists, as GraphSearch gives them

Drafts equal those of `beam_search` on the same logits. Logits themselves differ from PyTorch's by the order of sums.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.backends.torch.cuda.compiler import (
    SOURCES,
    Kernel,
    _address,
    _checked,
    cubin,
    pointer,
    tensor_map,
)
from trtllm_redrafter.redrafter.beam_search import DraftHead
from trtllm_redrafter.redrafter.config import TOP_CANDIDATES, DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter

_BOX = 64
"""Columns of a box: 128 bytes."""

_SHARED = 227 << 10
_SHARED_STATIC = 1 << 10
_FEWEST_STAGES = 6
_MAX_CANDIDATES = 256
_KEPT_BYTES = 24 << 20
"""Weights of this many bytes at most are kept in the L2 cache from round to round."""

_KEEP, _NORMAL, _STREAM = 0x14F0000000000000, 0x1000000000000000, 0x12F0000000000000


@dataclass(frozen=True)
class _Cut:
    """How a block's rows of a matrix are cut into boxes: tiles of `height` rows by `depth` times 64 columns."""

    tiles: int
    height: int
    depth: int

    @classmethod
    def of(cls, rows: int, columns: int, blocks: int, slot: int) -> _Cut:
        own = -(-rows // blocks)
        tiles = -(-own // 16)
        height = -(-own // tiles)
        return cls(tiles, height, _even(columns // _BOX, slot // (height * 128)))

    @property
    def rows(self) -> int:
        return self.tiles * self.height


def _even(count: int, limit: int) -> int:
    """The size of equal parts, none larger than `limit`, that `count` is cut into."""
    return -(-count // -(-count // min(limit, 256)))


@dataclass(frozen=True)
class Plan:
    """Everything the kernel is compiled for. Needs no GPU."""

    config: DrafterConfig
    shape: DraftShape
    batch: int
    head_rows: int
    head_columns: int
    blocks: int
    half: bool
    threads: int = 0
    """Warps that compute; 0: as many as fit."""

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
        return self.threads or (15 if self.groups <= 2 else 11 if self.groups <= 5 else 7)

    @property
    def head_depth(self) -> int:
        return _even(self.head_columns // _BOX, 8)

    @property
    def slot(self) -> int:
        return self.head_depth * 2048

    def cut(self, rows: int, columns: int) -> _Cut:
        return _Cut.of(rows, columns, self.blocks, self.slot)

    @property
    def cuts(self) -> dict[str, _Cut]:
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
        odd = [f"{name} {size}" for name, size in sizes.items() if size % _BOX]
        if odd:
            return f"{', '.join(odd)}: not a multiple of {_BOX}"
        if min(self.head_rows, config.vocab_size - 1) < TOP_CANDIDATES:
            return f"{self.head_rows} head rows: fewer than the {TOP_CANDIDATES} that survive the cut"
        if self.head_rows > 1 << 20 or config.num_layers > 16 or shape.num_beams > 16:
            return "more than 1,048,576 head rows, 16 residual blocks or 16 beams"
        if self.groups > 12:
            return f"{self.rows} rows, more than 96"
        if self.stages < _FEWEST_STAGES:
            return f"{self.rows} rows of {self.head_columns} leave too little shared memory"
        return None

    def machine_code(self, architecture: str, extra: Mapping[str, int | None] | None = None) -> bytes:
        headers = {"selection.cuh": (SOURCES / "selection.cuh").read_text()}
        return cubin("search.cu", {**self.constants(), **(extra or {})}, architecture, headers)


class _Cooperative(Kernel):
    """A kernel whose blocks all run at once, as barriers over the grid need."""

    def launch(self, grid: Sequence[int], threads: int, arguments: Sequence[Any], *, overlap: bool = False) -> None:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        config.attrs, config.numAttrs = [attribute], 1
        addresses = (ctypes.c_void_p * len(arguments))(*(_address(argument) for argument in arguments))
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(addresses), 0))


@cache
def _kernel(plan: Plan, extra: tuple[tuple[str, int | None], ...]) -> Kernel:
    return _Cooperative(plan.machine_code("sm_90a", dict(extra)), "search", plan.shared_bytes)


_POINTERS = (
    "embedding contexts roots rows state_bias input_bias layer_bias states features factored keys tile_best block_best "
    "beams arrivals tokens path_scores"
).split()


def _arguments(maps: Sequence[Any], pointers: Mapping[str, Tensor | None], tail: ctypes.Structure) -> Any:
    """`struct Search` as bytes."""
    packed = b"".join(ctypes.string_at(int(m.getPtr()), 128) for m in maps)
    packed += b"".join(bytes(ctypes.c_uint64(pointer(pointers[name]).value or 0)) for name in _POINTERS)
    packed += bytes(tail)
    packed += bytes(-len(packed) % 64)
    return (ctypes.c_uint8 * len(packed)).from_buffer_copy(packed)


class _Tail(ctypes.Structure):
    _fields_ = [
        ("kept", ctypes.c_uint64),
        ("streamed", ctypes.c_uint64),
        ("batch", ctypes.c_int),
        ("kept_tiles", ctypes.c_int),
    ]


class SearchKernel:
    """A drafter's searches of up to `max_batch_size` sequences; larger batches go in several launches."""

    def __init__(
        self,
        drafter: Drafter,
        embedding: Tensor,
        head: DraftHead,
        shape: DraftShape,
        *,
        max_batch_size: int,
        kept_head_bytes: int = 0,
        extra: Mapping[str, int | None] | None = None,
    ) -> None:
        shape.check()
        assert head.weight is not None
        self._drafter, self._embedding, self._head, self._shape = drafter, embedding, head, shape
        self._extra = tuple(sorted((extra or {}).items()))
        self._blocks = torch.cuda.get_device_properties(embedding.device).multi_processor_count
        self._largest = max(n for n in range(1, max_batch_size + 1) if n == 1 or self._plan(n).unsupported() is None)
        self._kept_head_bytes = kept_head_bytes
        self._weights = self._gather_weights()
        self._rows = None if head.rows is None else F.pad(head.rows.to(torch.int32), (0, -len(head.rows) % 16))
        self._launches: dict[tuple[int, int, int], Any] = {}
        self._buffers = self._make_buffers()

    @classmethod
    def unsupported(
        cls, drafter: Drafter, head: DraftHead, shape: DraftShape, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """Why these searches need another way, or None."""
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            return "the kernels are written for Hopper GPUs (compute capability 9.0)"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"weights are {dtype}, not 16 bits"
        if head.weight is None:
            return "the head's weight is not known"
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        return _plan(drafter.config, head, shape, 1, blocks, dtype).unsupported()

    def _plan(self, batch: int) -> Plan:
        return _plan(self._drafter.config, self._head, self._shape, batch, self._blocks, self._embedding.dtype)

    def _gather_weights(self) -> dict[str, Tensor | None]:
        d, head = self._drafter, self._head
        weights = {
            "state_w": d.rnn_w and d.rnn_w.weight, "state_u": d.rnn_u and d.rnn_u.weight,
            "input": d.input_proj and d.input_proj.weight, "factor": head.factor, "head": head.weight,
            "state_bias": d.rnn_u and d.rnn_u.bias, "input_bias": d.input_proj and d.input_proj.bias,
        }  # fmt: skip
        layers = {f"layer{i}": layer.linear.weight for i, layer in enumerate(d.layers)}
        biases = torch.stack([layer.linear.bias for layer in d.layers]) if len(d.layers) else None
        found = {**weights, **layers, "layer_bias": biases}
        return {name: None if t is None else t.detach().contiguous() for name, t in found.items()}

    def _make_buffers(self) -> dict[str, Tensor]:
        plan = self._plan(self._largest)
        config, rows, device, dtype = plan.config, plan.rows, self._embedding.device, self._embedding.dtype
        length = self._shape.draft_len + 1
        like = {"device": device, "dtype": dtype}
        keys = {"device": device, "dtype": torch.int16}
        return {
            "contexts": torch.zeros(self._largest, config.hidden_size, **like),
            "roots": torch.zeros(self._largest, dtype=torch.int64, device=device),
            "states": torch.zeros(2, rows, config.hidden_size, **like),
            "features": torch.zeros(2, rows, config.exit_dim, **like),
            "factored": torch.zeros(rows, plan.head_columns, **like),
            "keys": torch.zeros(rows, plan.pitch * 16, **keys),
            "tile_best": torch.zeros(rows, plan.pitch, **keys),
            "block_best": torch.zeros(rows, plan.blocks, **keys),
            "beams": torch.zeros(rows, 4, dtype=torch.int32, device=device),
            "arrivals": torch.zeros(2, dtype=torch.int32, device=device),
            "tokens": torch.zeros(self._largest, self._shape.num_beams, length, dtype=torch.int64, device=device),
            "path_scores": torch.zeros(self._largest, self._shape.num_beams, length, device=device),
        }

    def _boxes(self, plan: Plan) -> list[Any]:
        """Maps in the order of `struct Search`; what a drafter lacks is stood in for by its head."""
        cuts = plan.cuts
        head = _Cut(1, 16, plan.head_depth)
        wanted = [
            ("state_w", cuts["STATE"]), ("state_u", cuts["STATE"]), ("input", cuts["INPUT"]), ("factor", cuts["FACTOR"]),
            ("head", head), *((f"layer{i}", cuts["EXIT"]) for i in range(max(1, plan.config.num_layers)))
        ]  # fmt: skip
        maps = []
        for name, cut in wanted:
            weight = self._weights.get(name)
            if weight is None:
                weight, cut = self._weights["head"], head
            assert weight is not None
            rows, columns = weight.shape
            sizes, strides = [_BOX, rows, columns // _BOX], [2 * columns, 2 * _BOX]
            maps.append(tensor_map(weight, sizes, strides, [_BOX, cut.height, cut.depth]))
        return maps

    def __call__(self, contexts: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts [B, H] and roots [B], B <= `largest` -> tokens [B, K, L + 1] int64, path scores [B, K, L + 1] float32.

        Both are views of buffers that the next call writes anew. Runs on the current stream.
        """
        batch = len(roots)
        plan = self._plan(_bucket(batch, self._largest))
        key = (contexts.data_ptr(), roots.data_ptr(), batch)
        if key not in self._launches:
            if contexts.dtype != self._embedding.dtype or not contexts.is_contiguous() or roots.dtype != torch.int64:
                raise ValueError("contexts must be contiguous and of the embedding's dtype, roots int64")
            if batch > self._largest:
                raise ValueError(f"{batch} sequences in one launch, at most {self._largest}")
            self._launches[key] = self._arguments(plan, contexts, roots)
        _kernel(plan, self._extra).launch((plan.blocks,), plan.warps * 32 + 32, [self._launches[key]])
        return self._buffers["tokens"][:batch], self._buffers["path_scores"][:batch]

    def _arguments(self, plan: Plan, contexts: Tensor, roots: Tensor) -> Any:
        matrices = {name: t for name, t in self._weights.items() if t is not None and t.dim() == 2}
        small = sum(2 * t.numel() for name, t in matrices.items() if name != "head")
        tiles = self._kept_head_bytes // (32 * plan.head_columns * plan.blocks)
        tail = _Tail(_KEEP if small <= _KEPT_BYTES else _NORMAL, _STREAM, len(roots), tiles)
        pointers: dict[str, Tensor | None] = {
            **self._weights, **self._buffers, "embedding": self._embedding, "rows": self._rows,
            "contexts": contexts, "roots": roots,
        }  # fmt: skip
        return _arguments(self._boxes(plan), pointers, tail)

    @torch.no_grad()
    def search(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> list[list[list[int]]]:
        """Contexts [H] and last tokens of B sequences -> beams [B][K][L + 1]."""
        found: list[list[list[int]]] = []
        with torch.cuda.device(self._embedding.device):
            for start in range(0, len(roots), self._largest):
                part = slice(start, start + self._largest)
                count = len(roots[part])
                context = torch.stack(list(contexts[part]), out=self._buffers["contexts"][:count])
                root = self._buffers["roots"][:count]
                root.copy_(torch.tensor(roots[part], dtype=torch.int64))
                found += self(context, root)[0].tolist()
        return found

    @property
    def largest(self) -> int:
        """Sequences that one launch takes."""
        return self._largest


def _bucket(batch: int, largest: int) -> int:
    """Kernels are compiled for few sizes of batches."""
    return min(largest, 1 << (batch - 1).bit_length())


def _plan(
    config: DrafterConfig, head: DraftHead, shape: DraftShape, batch: int, blocks: int, dtype: torch.dtype
) -> Plan:
    assert head.weight is not None
    rows, columns = head.weight.shape
    return Plan(config, shape, batch, rows, columns, blocks, dtype == torch.float16)
