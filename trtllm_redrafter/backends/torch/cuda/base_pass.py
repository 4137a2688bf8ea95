"""One pass of the base model over the rows of token trees, as a chain of CUDA kernels.

Per layer: product (qkv), store, attend, combine, product (dense), add_norm, product (gate and up), product (down),
add_norm. Every kernel may start while the one before it runs and asks for its weights first, so the memory keeps
reading across kernels. What a row comes to does not depend on the other rows.

    model = BasePass(config, weights, cache, rotary, max_rows=256, logits_rows=32)
    model.launch(packed, Layout(rows=32, batch=1, nodes=26, path=6), span=512)     # inside a graph's capture
    model.launch_head(model.hidden, 32)                                            # then model.best holds the tokens
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.cuda.compiler import compiled, pointer
from trtllm_redrafter.backends.torch.cuda.linear import SMALL, Linear
from trtllm_redrafter.backends.torch.layout import Layout
from trtllm_redrafter.backends.torch.weights import LayerWeights, ModelWeights
from trtllm_redrafter.checkpoint.config import CheckpointConfig

MAX_ROWS = 256
"""Of one product."""

SEGMENT = 128
_BLOCK = 32
_ATTEND_THREADS = 128
_CHAIN_BLOCKS = 2
"""Blocks per multiprocessor that a prompt's queries are dealt out to, each of which reads the committed positions; with
trees every sixteen queries have a block of their own."""


_PARTS = ("sequence", "depths", "paths", "slots", "bases", "first")


class _Pass(ctypes.Structure):
    """Where the parts of a `Layout` lie, and the cache positions of a slot."""

    _fields_ = [*((name, ctypes.c_void_p) for name in _PARTS), ("capacity", ctypes.c_longlong)]


def tail_blocks(path: int) -> int:
    """Blocks of keys that can hold positions of a pass whose longest path is `path` nodes."""
    return 1 + (path + _BLOCK - 2) // _BLOCK


def unsupported(config: CheckpointConfig, weights: ModelWeights) -> str | None:
    """Why these kernels cannot run a model, or None."""
    if weights.embedding.dtype not in (torch.bfloat16, torch.float16):
        return "they compute in bfloat16 and float16"
    if config.head_size not in (64, 128, 256):
        return f"the head size is {config.head_size}, not 64, 128 or 256"
    if any(layer.gate_proj_bias is not None or layer.up_proj_bias is not None for layer in weights.layers):
        return "the MLP has biases"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return "hidden and intermediate size are no multiples of 8"
    return None


@dataclass(frozen=True)
class _Products:
    """A layer's matrices."""

    qkv: Linear
    dense: Linear
    gated: Linear
    down: Linear

    @classmethod
    def of(cls, layer: LayerWeights, multiprocessors: int) -> _Products:
        return cls(
            Linear(layer.qkv, "partial", multiprocessors),
            Linear(layer.dense, "partial", multiprocessors, shared=SMALL),
            Linear(torch.cat([layer.gate_proj, layer.up_proj]), "gated", multiprocessors),
            Linear(layer.down_proj, "partial", multiprocessors, shared=SMALL),
        )

    @property
    def widest_partial(self) -> int:
        return max(product.splits * product.width for product in (self.qkv, self.dense, self.down))


def _without_matrices(layer: LayerWeights) -> LayerWeights:
    """Their memory is given back, so that a model is never there twice."""
    for matrix in (layer.qkv, layer.dense, layer.gate_proj, layer.up_proj, layer.down_proj):
        matrix.untyped_storage().resize_(0)
    nothing = layer.input_norm.new_empty(0)
    return replace(layer, qkv=nothing, dense=nothing, gate_proj=nothing, up_proj=nothing, down_proj=nothing)


class BasePass:
    """A model's weights in the kernels' order, its cache, buffers and kernels."""

    def __init__(
        self,
        config: CheckpointConfig,
        weights: ModelWeights,
        cache: tuple[Tensor, Tensor],
        rotary: tuple[Tensor, Tensor],
        *,
        max_rows: int,
        logits_rows: int,
    ) -> None:
        """`cache`: keys, values [layers, slots, M, C, D]; `rotary`: cosine, sine [C, D].

        A pass has at most `max_rows` rows, one with logits `logits_rows`. The matrices of the layers in `weights` are
        taken apart and cannot be used afterwards.
        """
        self._config, self._cache, self._rotary = config, cache, rotary
        device = weights.embedding.device
        self._count = torch.cuda.get_device_properties(device).multi_processor_count
        self._products, rest = [], []
        for layer in weights.layers:
            self._products.append(_Products.of(layer, self._count))
            rest.append(_without_matrices(layer))
        self._head = Linear(weights.head, "logits", self._count)
        self.weights = replace(weights, layers=tuple(rest))
        h, heads = config.hidden_size, config.num_attention_heads

        def make(*shape: int, dtype: torch.dtype = weights.embedding.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._residual, self.hidden = make(max_rows, h), make(max_rows, h)
        self._query, self._mixed = make(max_rows, heads * config.head_size), make(max_rows, heads * config.head_size)
        self._gated = make(max_rows, config.intermediate_size)
        self._partial = make(max_rows * self._products[0].widest_partial, dtype=torch.float32)
        self.logits = make(logits_rows, len(weights.head))
        self._found = (
            make(self._count, logits_rows, dtype=torch.float32),
            make(self._count, logits_rows, dtype=torch.int32),
        )
        self.best = make(logits_rows, dtype=torch.int64)
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    def launch(self, packed: Tensor, layout: Layout, span: int) -> None:
        """Queue the kernels up to `hidden` for `layout.rows` rows; `span` bounds the committed positions.

        All but the first read `packed` and committed positions without waiting for the kernel before them.
        """
        rows = layout.rows
        parts = layout.split(packed)
        arguments = _Pass(*(parts[name].data_ptr() for name in _PARTS), self._cache[0].shape[3])
        self._norm(rows, self.weights.layers[0].input_norm, tokens=parts["tokens"])
        following = [*(layer.input_norm for layer in self.weights.layers[1:]), self.weights.final_norm]
        for index, (layer, its) in enumerate(zip(self.weights.layers, self._products, strict=True)):
            its.qkv(self.hidden, rows, self._partial)
            self._attention(index, layer, its.qkv.splits, arguments, layout, span)
            its.dense(self._mixed, rows, self._partial)
            self._norm(rows, layer.post_norm, splits=its.dense.splits, bias=layer.dense_bias)
            its.gated(self.hidden, rows, self._gated)
            its.down(self._gated, rows, self._partial)
            self._norm(rows, following[index], splits=its.down.splits, bias=layer.down_proj_bias)

    def launch_head(self, hidden: Tensor, rows: int) -> None:
        """Queue `logits` and `best` of hidden [>= rows, H]."""
        self._head(hidden, rows, self.logits, self._found)
        values, places = self._found
        blocks, count = ctypes.c_int(self._head.blocks), ctypes.c_int(rows)
        best = compiled("reduce.cu", "best_token", {})
        best.launch((rows,), 32, [pointer(values), pointer(places), blocks, count, pointer(self.best)])

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
             pointer(self.weights.embedding)],
            overlap=tokens is None,
        )  # fmt: skip

    def _attention(
        self, index: int, layer: LayerWeights, splits: int, arguments: _Pass, layout: Layout, span: int
    ) -> None:
        config, rows = self._config, layout.rows
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_size
        flags: dict[str, int | None] = {} if layer.q_norm is None else {"HAS_NORM": None}
        flags |= {"CHAIN": None} if layout.chain else {}
        constants = self._constants(D=size, HEADS=heads, KV_HEADS=kv_heads, PATH=layout.path, **flags)
        keys, values = self._cache[0][index], self._cache[1][index]
        warps = min(16, heads + 2 * kv_heads)
        compiled("attention.cu", "store", constants).launch(
            (rows, -(-(heads + 2 * kv_heads) // warps)), 32 * warps,
            [pointer(self._partial), ctypes.c_int(splits), pointer(layer.qkv_bias), pointer(layer.q_norm),
             pointer(layer.k_norm), ctypes.c_float(config.norm_epsilon), pointer(self._rotary[0]),
             pointer(self._rotary[1]), arguments, pointer(self._query), pointer(keys), pointer(values)],
        )  # fmt: skip
        segments = -(-span // SEGMENT)
        tails = tail_blocks(layout.path)
        nodes = min(rows, layout.nodes)
        tiles = -(-nodes * (heads // kv_heads) // 16)
        groups = tiles
        if layout.chain:
            groups = max(1, min(tiles, _CHAIN_BLOCKS * self._count // max(1, segments * kv_heads * layout.batch)))
        group_tiles = -(-tiles // groups)
        parts, weights = self._parts_for(segments + tails)
        shared = 4 * 2 * _BLOCK * size * 2 + (4 * 16 * size * 4 if group_tiles > 1 else 0)
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
