"""One pass of the base model over the rows of token trees, as a chain of CUDA kernels.

Per layer: product (qkv), store, attend, combine, product (dense), add_norm, product (gate and up), product (down),
add_norm. Every kernel may start while the one before it runs and asks for its weights first, so the memory keeps
reading across kernels. What a row comes to does not depend on the other rows.

    model = BasePass(config, weights, cache, rotary, limits)
    model.launch(packed, rows=32, batch=1, span=512)      # inside a graph's capture; outputs are model.hidden, ...
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.cuda.compiler import compiled, pointer
from trtllm_redrafter.backends.torch.cuda.linear import Linear
from trtllm_redrafter.backends.torch.weights import LayerWeights, ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.redrafter.token_tree import Tree

MAX_ROWS = 256
SEGMENT = 128
_BLOCK = 32
_ATTEND_THREADS = 128


class _Pass(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("sequence", "depths", "paths", "slots", "bases", "first")] + [
        ("capacity", ctypes.c_longlong)
    ]


@dataclass(frozen=True)
class Layout:
    """Where a pass's integers lie in its buffer: per row sequence, depth, path and token, per sequence slot and base."""

    rows: int
    batch: int
    path: int
    width: int  # nodes of a tree, at most

    @property
    def size(self) -> int:
        return self.rows * (3 + self.path) + 3 * self.batch + 1

    def pack(self, slots: Sequence[int], bases: Sequence[int], trees: Sequence[Tree]) -> list[int]:
        """Rows of all trees end to end; padding rows belong to no sequence."""
        sequence, depths, paths, tokens, first = [], [], [], [], [0]
        for number, tree in enumerate(trees):
            sequence += [number] * len(tree)
            depths += tree.depths
            tokens += tree.tokens
            for path in tree.paths()[: len(tree)]:
                paths += path + path[-1:] * (self.path - len(path))
            first.append(len(tokens))
        missing, empty = self.rows - len(tokens), self.batch - len(trees)
        return [
            *sequence, *[-1] * missing, *depths, *[0] * missing, *paths, *[0] * (missing * self.path),
            *slots, *[0] * empty, *bases, *[0] * empty, *first, *first[-1:] * empty, *tokens, *[0] * missing,
        ]  # fmt: skip

    def views(self, packed: Tensor, capacity: int) -> tuple[_Pass, Tensor]:
        sizes = [self.rows, self.rows, self.rows * self.path, self.batch, self.batch, self.batch + 1, self.rows]
        *parts, tokens = torch.split(packed, sizes)
        return _Pass(*(part.data_ptr() for part in parts), capacity), tokens


def unsupported(config: CheckpointConfig, weights: ModelWeights) -> str | None:
    """Why these kernels cannot run a model, or None."""
    if weights.embedding.dtype not in (torch.bfloat16, torch.float16):
        return "they compute in bfloat16 and float16"
    if config.head_size not in (64, 128, 256):
        return f"head size {config.head_size}, not 64, 128 or 256"
    if any(layer.activated_bias is not None or layer.linear_bias is not None for layer in weights.layers):
        return "biases in the MLP"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return "sizes that are no multiple of 8"
    return None


def stacked(weights: ModelWeights) -> ModelWeights:
    """The same weights, gate and up of a layer in one piece of memory, one after the other."""

    def stack(layer: LayerWeights) -> LayerWeights:
        both = torch.cat([layer.activated, layer.linear])
        return replace(layer, activated=both[: len(layer.activated)], linear=both[len(layer.activated) :])

    return replace(weights, layers=tuple(stack(layer) for layer in weights.layers))


def _both(layer: LayerWeights) -> Tensor:
    """[2 I, H]: what `stacked` has laid together."""
    count, width = layer.activated.shape
    return layer.activated.as_strided((2 * count, width), (width, 1))


class BasePass:
    """Weights (made by `stacked`), cache and buffers of a model, and its kernels."""

    def __init__(
        self,
        config: CheckpointConfig,
        weights: ModelWeights,
        cache: tuple[Tensor, Tensor],
        rotary: tuple[Tensor, Tensor],
        *,
        max_rows: int,
        path: int,
    ) -> None:
        """`cache`: keys, values [layers, slots, M, C, D]; `rotary`: cosine, sine [C, D]; `path`: longest path of a tree."""
        self._config, self._weights, self._cache, self._rotary, self._path = config, weights, cache, rotary, path
        device = weights.embedding.device
        count = torch.cuda.get_device_properties(device).multi_processor_count
        self._count = count
        self._products = [
            (
                Linear(layer.qkv, "partial", count),
                Linear(layer.dense, "partial", count),
                Linear(_both(layer), "gated", count),
                Linear(layer.down, "partial", count),
            )
            for layer in weights.layers
        ]
        self._head = Linear(weights.head, "logits", count)
        rows, h, heads = max_rows, config.hidden_size, config.num_attention_heads

        def make(*shape: int, dtype: torch.dtype = weights.embedding.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._residual, self.hidden = make(rows, h), make(rows, h)
        self._query, self._mixed = make(rows, heads * config.head_size), make(rows, heads * config.head_size)
        self._gated = make(rows, config.intermediate_size)
        widest = max(product.splits * product.width for product in self._products[0][::1] if product.kind == "partial")
        self._partial = make(rows * widest, dtype=torch.float32)
        self.logits = make(rows, len(weights.head))
        self._found = make(count, rows, dtype=torch.float32), make(count, rows, dtype=torch.int32)
        self.best = make(rows, dtype=torch.int64)
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    def launch(self, packed: Tensor, layout: Layout, span: int) -> None:
        """Queue all kernels for `layout.rows` rows; no sequence has more than `span` committed positions."""
        config, rows = self._config, layout.rows
        arguments, tokens = layout.views(packed, self._cache[0].shape[3])
        self._norm(rows, self._weights.layers[0].input_norm, tokens=tokens)
        for index, layer in enumerate(self._weights.layers):
            qkv, dense, gated, down = self._products[index]
            last = index + 1 == config.num_hidden_layers
            qkv(self.hidden, rows, self._partial)
            self._attention(index, layer, qkv.splits, arguments, layout, span)
            dense(self._mixed, rows, self._partial)
            self._norm(rows, layer.post_norm, splits=dense.splits, bias=layer.dense_bias)
            gated(self.hidden, rows, self._gated)
            down(self._gated, rows, self._partial)
            following = self._weights.final_norm if last else self._weights.layers[index + 1].input_norm
            self._norm(rows, following, splits=down.splits, bias=layer.down_bias)
        self._head(self.hidden, rows, self.logits, self._found)
        best = compiled("reduce.cu", "best_token", {})
        blocks = ctypes.c_int(self._head.blocks)
        values, places = self._found
        best.launch((rows,), 32, [pointer(values), pointer(places), blocks, ctypes.c_int(rows), pointer(self.best)])

    def _constants(self, **more: int | None) -> dict[str, int | None]:
        half: dict[str, int | None] = {"DTYPE_HALF": None} if self.hidden.dtype == torch.float16 else {}
        return {**half, **more}

    def _norm(
        self, rows: int, weight: Tensor, *, splits: int = 0, bias: Tensor | None = None, tokens: Tensor | None = None
    ) -> None:
        threads = min(1024, -(-self._config.hidden_size // 64) * 32)
        constants = self._constants(WIDTH=self._config.hidden_size, THREADS=threads)
        compiled("norm.cu", "add_norm", constants).launch(
            (rows,), threads,
            [pointer(self._residual), pointer(self._partial), ctypes.c_int(splits), pointer(bias), pointer(weight),
             pointer(self.hidden), ctypes.c_float(self._config.norm_epsilon), pointer(tokens),
             pointer(self._weights.embedding)],
        )  # fmt: skip

    def _attention(
        self, index: int, layer: LayerWeights, splits: int, arguments: _Pass, layout: Layout, span: int
    ) -> None:
        config, rows = self._config, layout.rows
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_size
        has_norm: dict[str, int | None] = {} if layer.q_norm is None else {"HAS_NORM": None}
        constants = self._constants(D=size, HEADS=heads, KV_HEADS=kv_heads, PATH=self._path, **has_norm)
        keys, values = self._cache[0][index], self._cache[1][index]
        warps = min(16, heads + 2 * kv_heads)
        compiled("attention.cu", "store", constants).launch(
            (rows, -(-(heads + 2 * kv_heads) // warps)), 32 * warps,
            [pointer(self._partial), ctypes.c_int(splits), pointer(layer.qkv_bias), pointer(layer.q_norm),
             pointer(layer.k_norm), ctypes.c_float(config.norm_epsilon), pointer(self._rotary[0]),
             pointer(self._rotary[1]), arguments, pointer(self._query), pointer(keys), pointer(values)],
        )  # fmt: skip
        segments = -(-span // SEGMENT)
        tails = 1 + (self._path + _BLOCK - 2) // _BLOCK
        nodes = min(rows, layout.width)
        tiles = -(-nodes * (heads // kv_heads) // 16)
        groups = max(1, min(tiles, 2 * self._count // max(1, segments * kv_heads * layout.batch)))
        group_tiles = -(-tiles // groups)
        parts, weights = self._parts_for(segments + tails)
        shared = 4 * 2 * _BLOCK * size * 2 + 4 * 16 * size * 4
        integers = [ctypes.c_int(n) for n in (rows, segments, groups, group_tiles)]
        compiled("attention.cu", "attend", constants, shared_bytes=shared).launch(
            (segments * groups + -(-nodes * tails // 4), kv_heads, layout.batch), _ATTEND_THREADS,
            [pointer(self._query), pointer(keys), pointer(values), arguments, *integers,
             ctypes.c_float(math.log2(math.e) * size**-0.5), pointer(parts), pointer(weights)],
        )  # fmt: skip
        threads = size * min(heads // kv_heads, 1024 // size)
        compiled("attention.cu", "combine", constants).launch(
            (rows, kv_heads), threads,
            [pointer(parts), pointer(weights), arguments, ctypes.c_int(segments), pointer(self._mixed)],
        )  # fmt: skip

    def _parts_for(self, count: int) -> tuple[Tensor, Tensor]:
        """Partial results of attention; graphs of all shapes share the largest."""
        if count not in self._parts:
            rows, heads, size = len(self.hidden), self._config.num_attention_heads, self._config.head_size
            shape = (count, rows, heads)
            parts = torch.zeros(*shape, size, dtype=torch.float32, device=self.hidden.device)
            self._parts[count] = parts, parts.new_zeros(*shape, 2)
        return self._parts[count]
