"""The drafter's beam search as one CUDA kernel: launches `search.cu`.

    reason = SearchKernel.unsupported(drafter, embedding, head, shape)     # None: it can
    search = SearchKernel(drafter, embedding, head, shape, max_batch_size=4)
    tokens, path_scores = search(contexts, roots)        # on the device; captured into a graph with everything else
    search.search([context, ...], [root, ...])           # lists and flags, as GraphSearch gives them

Drafts equal those of `beam_search` on the same logits. Logits themselves differ from PyTorch's by the order of sums.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.backends.torch.cuda.compiler import Kernel, pointer, tensor_map
from trtllm_redrafter.backends.torch.cuda.search_plan import BOX, Cut, SearchPlan
from trtllm_redrafter.backends.torch.search import PlainSearch
from trtllm_redrafter.redrafter.beam_search import DraftHead
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape
from trtllm_redrafter.redrafter.drafter import Drafter

_KEPT_BYTES, _KEPT_HEAD_BYTES = 24 << 20, 12 << 20
"""Small matrices of so many bytes at most are kept in the L2 cache from round to round, and then a part of the head."""

_KEEP, _NORMAL, _STREAM = 0x14F0000000000000, 0x1000000000000000, 0x12F0000000000000


@cache
def _kernel(plan: SearchPlan, device: int) -> Kernel:
    """Loaded on this device, which is the current one."""
    return Kernel(plan.machine_code("sm_90a"), "search", plan.shared_bytes, cooperative=True)


_POINTERS = (
    "embedding", "contexts", "roots", "rows", "state_bias", "input_bias", "layer_bias", "states", "features",
    "factored", "keys", "tile_best", "block_best", "beams", "arrivals", "tokens", "path_scores",
)  # fmt: skip
"""In the order of `struct Search`."""


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


class SearchKernel(PlainSearch):
    """A drafter's searches of up to `max_batch_size` sequences; larger batches go in several launches.

    `beams`, whose scores checks ask for, is PyTorch's.
    """

    def __init__(
        self,
        drafter: Drafter,
        embedding: Tensor,
        head: DraftHead,
        shape: DraftShape,
        *,
        max_batch_size: int,
    ) -> None:
        super().__init__(drafter, embedding, head, shape)
        shape.check()
        assert head.weight is not None
        self._blocks = torch.cuda.get_device_properties(embedding.device).multi_processor_count
        self._largest = max(n for n in range(1, max_batch_size + 1) if n == 1 or self._plan(n).unsupported() is None)
        self._weights = self._gather_weights()
        self._rows = None if head.rows is None else F.pad(head.rows.to(torch.int32), (0, -len(head.rows) % 16))
        self._launches: dict[tuple[int, int, int], Any] = {}
        self._buffers = self._make_buffers()

    @classmethod
    def unsupported(cls, drafter: Drafter, embedding: Tensor, head: DraftHead, shape: DraftShape) -> str | None:
        """Why these searches need another way, or None."""
        device, dtype = embedding.device, embedding.dtype
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            return "the kernel is written for Hopper GPUs (compute capability 9.0)"
        if head.weight is None:
            return "the head's weight is not known"
        tensors = [*drafter.parameters(), head.weight, *([] if head.factor is None else [head.factor])]
        kinds = {str(t.dtype) for t in tensors} | {str(dtype)}
        if len(kinds) > 1 or dtype not in (torch.bfloat16, torch.float16):
            return f"weights are {', '.join(sorted(kinds))}: not all bfloat16, nor all float16"
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        return _plan(drafter.config, head, shape, 1, blocks, dtype).unsupported()

    def _plan(self, batch: int) -> SearchPlan:
        return _plan(self._drafter.config, self._head, self.shape, batch, self._blocks, self._embedding.dtype)

    def _gather_weights(self) -> dict[str, Tensor | None]:
        parameters, count = dict(self._drafter.named_parameters()), self._drafter.config.num_layers
        names = {
            "state_w": "rnn_w.weight", "state_u": "rnn_u.weight", "state_bias": "rnn_u.bias",
            "input": "input_proj.weight", "input_bias": "input_proj.bias",
        }  # fmt: skip
        names |= {f"layer{i}": f"layers.{i}.linear.weight" for i in range(count)}
        found: dict[str, Tensor | None] = {name: parameters.get(source) for name, source in names.items()}
        found |= {"head": self._head.weight, "factor": self._head.factor, "layer_bias": None}
        if count:
            found["layer_bias"] = torch.stack([parameters[f"layers.{i}.linear.bias"] for i in range(count)])
        return {name: None if t is None else t.detach().contiguous() for name, t in found.items()}

    def _make_buffers(self) -> dict[str, Tensor]:
        plan, shape = self._plan(self._largest), self.shape
        config, rows, like = plan.config, plan.rows, self._embedding
        beams = (self._largest, shape.num_beams, shape.draft_len + 1)
        return {
            "contexts": like.new_zeros(self._largest, config.hidden_size),
            "roots": like.new_zeros(self._largest, dtype=torch.int64),
            "states": like.new_zeros(2, rows, config.hidden_size),
            "features": like.new_zeros(2, rows, config.exit_dim),
            "factored": like.new_zeros(rows, plan.head_columns),
            "keys": like.new_zeros(rows, plan.pitch * 16, dtype=torch.int16),
            "tile_best": like.new_zeros(rows, plan.pitch, dtype=torch.int16),
            "block_best": like.new_zeros(rows, plan.blocks, dtype=torch.int16),
            "beams": like.new_zeros(rows, 4, dtype=torch.int32),
            "arrivals": like.new_zeros(2, dtype=torch.int32),
            "tokens": like.new_zeros(beams, dtype=torch.int64),
            "path_scores": like.new_zeros(beams, dtype=torch.float32),
        }

    def _boxes(self, plan: SearchPlan) -> list[Any]:
        """Maps in the order of `struct Search`; what a drafter lacks is stood in for by its head."""
        cuts = plan.cuts
        head = Cut(1, 16, plan.head_depth)
        wanted = [("state_w", cuts["STATE"]), ("state_u", cuts["STATE"]), ("input", cuts["INPUT"])]
        wanted += [("factor", cuts["FACTOR"]), ("head", head)]
        wanted += [(f"layer{i}", cuts["EXIT"]) for i in range(max(1, plan.config.num_layers))]
        maps = []
        for name, cut in wanted:
            weight = self._weights.get(name)
            if weight is None:
                weight, cut = self._weights["head"], head
            assert weight is not None
            rows, columns = weight.shape
            sizes, strides = [BOX, rows, columns // BOX], [2 * columns, 2 * BOX]
            maps.append(tensor_map(weight, sizes, strides, [BOX, cut.height, cut.depth]))
        return maps

    def __call__(self, contexts: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts [B, H] and roots [B] int64, B <= `largest` -> tokens [B, K, L + 1] int64 and path scores, float32.

        Both are views of buffers that the next call writes anew. Runs on the current stream, one search at a time; the
        current device must be that of the weights.
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
        _kernel(plan, torch.cuda.current_device()).launch((plan.blocks,), plan.warps * 32 + 32, [self._launches[key]])
        return self._buffers["tokens"][:batch], self._buffers["path_scores"][:batch]

    def _arguments(self, plan: SearchPlan, contexts: Tensor, roots: Tensor) -> Any:
        matrices = {name: t for name, t in self._weights.items() if t is not None and t.dim() == 2}
        fits = sum(2 * t.numel() for name, t in matrices.items() if name != "head") <= _KEPT_BYTES
        tiles = _KEPT_HEAD_BYTES // (32 * plan.head_columns * plan.blocks) if fits else 0
        tail = _Tail(_KEEP if fits else _NORMAL, _STREAM, len(roots), tiles)
        pointers: dict[str, Tensor | None] = {
            **self._weights, **self._buffers, "embedding": self._embedding, "rows": self._rows,
            "contexts": contexts, "roots": roots,
        }  # fmt: skip
        return _arguments(self._boxes(plan), pointers, tail)

    @torch.no_grad()
    def search(self, contexts: Sequence[Tensor], roots: Sequence[int]) -> tuple[list[list[list[int]]], list[bool]]:
        found: list[list[list[int]]] = []
        finite: list[bool] = []
        with torch.cuda.device(self._embedding.device):
            for start in range(0, len(roots), self._largest):
                part = slice(start, start + self._largest)
                count = len(roots[part])
                context = torch.stack(list(contexts[part]), out=self._buffers["contexts"][:count])
                root = self._buffers["roots"][:count]
                root.copy_(torch.tensor(roots[part], dtype=torch.int64))
                tokens, path_scores = self(context, root)
                flags = path_scores.isfinite().all(-1, keepdim=True).to(tokens)
                beams = torch.cat([tokens, flags], dim=-1).tolist()  # one copy to the host
                found += [[beam[:-1] for beam in rows] for rows in beams]
                finite += [all(beam[-1] for beam in rows) for rows in beams]
        return found, finite

    @property
    def largest(self) -> int:
        """Sequences that one launch takes."""
        return self._largest


def _bucket(batch: int, largest: int) -> int:
    """Kernels are compiled for few sizes of batches."""
    return min(largest, 1 << (batch - 1).bit_length())


def _plan(
    config: DrafterConfig, head: DraftHead, shape: DraftShape, batch: int, blocks: int, dtype: torch.dtype
) -> SearchPlan:
    assert head.weight is not None
    rows, columns = head.weight.shape
    return SearchPlan(config, shape, batch, rows, columns, blocks, dtype == torch.float16)
