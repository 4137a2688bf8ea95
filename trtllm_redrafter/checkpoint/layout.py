"""Names and shapes of all tensors of a checkpoint, and how each is split over tensor-parallel ranks.

One table serves both directions: `rank_slice` returns the part of a whole ("joined") tensor that rank r has, which the
converter copies out and the reader copies back. Joined qkv is [all q heads; all k heads; all v heads].

    specs = tensor_specs(config)                                   # name → TensorSpec
    rank_slice(specs["lm_head.weight"], config, rank=1).rows       # ((64128, 128256),)

    tp 2, 4 q heads, 1 kv head, D rows each     rank 0: q0 q1 | k0 | v0     rank 1: q2 q3 | k0 | v0   (k0, v0 repeated)
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.names import DRAFTER, EMBEDDING, LM_HEAD, LN_F, layer_prefix
from trtllm_redrafter.checkpoint.quantization import KV_CACHE_SCALES, MODEL_DTYPE, SCHEMES, QuantTensor, is_excluded
from trtllm_redrafter.errors import Problem

DTYPE_NAMES: Mapping[str, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""`dtype` of config.json → safetensors."""


class Split(enum.Enum):
    """How a tensor is split over ranks."""

    COPY = "whole on every rank"
    ROWS = "rows"
    COLUMNS = "columns"
    QKV = "rows, by attention heads"
    VOCAB = "rows, padded with zeros to a multiple of the ranks"


@dataclass(frozen=True)
class TensorSpec:
    """A whole tensor: its joined shape (vocabulary without padding), stored dtype and split.

    `optional` tensors may be absent. `checked` is False if shape and dtype are not known (a quantization scheme outside
    the table, or one that may leave weights unquantized).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    split: Split
    optional: bool = False
    checked: bool = True


@dataclass(frozen=True)
class RankSlice:
    """One rank's part of a joined tensor: concatenated row ranges, a column range, and zero rows at the end."""

    rows: tuple[tuple[int, int], ...]
    cols: tuple[int, int] | None
    zero_rows: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        if not whole:
            return whole
        count = sum(stop - start for start, stop in self.rows) + self.zero_rows
        width = whole[1:] if self.cols is None else (self.cols[1] - self.cols[0], *whole[2:])
        return (count, *width)


def tensor_specs(config: CheckpointConfig) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint, drafter included, by name."""
    specs = [*_top(config)]
    for i in range(config.num_hidden_layers):
        specs += _layer(config, layer_prefix(i))
    specs += _drafter(config)
    return {spec.name: spec for spec in specs}


def _top(config: CheckpointConfig) -> Iterator[TensorSpec]:
    dtype = DTYPE_NAMES[config.dtype]
    v, h = config.vocab_size, config.hidden_size
    split = Split.COPY
    if config.use_parallel_embedding:
        split = Split.COLUMNS if config.embedding_sharding_dim == 1 else Split.VOCAB
    yield TensorSpec(EMBEDDING, dtype, (v, h), split)
    yield TensorSpec(LN_F, dtype, (h,), Split.COPY)
    yield from _linear(config, "lm_head", v, h, Split.VOCAB, bias=False, may_lack=config.tie_word_embeddings)


def _layer(config: CheckpointConfig, prefix: str) -> Iterator[TensorSpec]:
    dtype = DTYPE_NAMES[config.dtype]
    h, inter, d = config.hidden_size, config.intermediate_size, config.head_size
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    yield TensorSpec(prefix + "input_layernorm.weight", dtype, (h,), Split.COPY)
    yield TensorSpec(prefix + "post_layernorm.weight", dtype, (h,), Split.COPY)
    if config.has_qk_norm:
        yield TensorSpec(prefix + "attention.q_layernorm.weight", dtype, (d,), Split.COPY)
        yield TensorSpec(prefix + "attention.k_layernorm.weight", dtype, (d,), Split.COPY)
    yield from _linear(config, prefix + "attention.qkv", q + 2 * kv, h, Split.QKV, bias=config.attn_bias)
    yield from _linear(config, prefix + "attention.dense", h, q, Split.COLUMNS, bias=config.dense_bias)
    yield from _linear(config, prefix + "mlp.fc", inter, h, Split.ROWS, bias=config.mlp_bias)
    yield from _linear(config, prefix + "mlp.gate", inter, h, Split.ROWS, bias=config.mlp_bias)
    yield from _linear(config, prefix + "mlp.proj", h, inter, Split.COLUMNS, bias=config.mlp_bias)
    if config.kv_cache_quant_algo is not None:
        for name in KV_CACHE_SCALES:
            yield TensorSpec(prefix + "attention." + name, "F32", (1,), Split.COPY, optional=True)


def _linear(
    config: CheckpointConfig, module: str, out: int, inner: int, split: Split, *, bias: bool, may_lack: bool = False
) -> Iterator[TensorSpec]:
    """Weight, bias and quantization tensors of one linear layer."""
    dtype = DTYPE_NAMES[config.dtype]
    excluded = is_excluded(module, config.quantization.get("exclude_modules"))
    quantized = config.quant_algo is not None and not excluded
    scheme = SCHEMES.get(config.quant_algo or "") if quantized else None
    if scheme is None:
        yield TensorSpec(module + ".weight", dtype, (out, inner), split, may_lack, checked=not quantized)
    else:
        group = config.quantization.get("group_size") or 128
        for suffix, tensor in scheme.items():
            shape = tensor.shape(out, inner, group)
            stored = dtype if tensor.dtype == MODEL_DTYPE else tensor.dtype
            how = _quant_split(tensor, split)
            yield TensorSpec(f"{module}.{suffix}", stored, shape, how, tensor.optional)
    if bias:
        yield TensorSpec(module + ".bias", dtype, (out,), Split.COPY if split is Split.COLUMNS else split)


def _quant_split(tensor: QuantTensor, split: Split) -> Split:
    """Scales are split along the weight's axis that they belong to."""
    if split is Split.COLUMNS:
        if tensor.axes == ("in",):
            return Split.ROWS
        return Split.COLUMNS if len(tensor.axes) == 2 else Split.COPY
    return split if "out" in tensor.axes else Split.COPY


def _drafter(config: CheckpointConfig) -> Iterator[TensorSpec]:
    if config.drafter is None:
        return
    dtype = DTYPE_NAMES[config.dtype]
    for name, shape in config.drafter.parameter_shapes().items():
        yield TensorSpec(DRAFTER + name, dtype, shape, Split.VOCAB if name == LM_HEAD else Split.ROWS)


def rank_slice(spec: TensorSpec, config: CheckpointConfig, rank: int) -> RankSlice:
    """The part of the joined tensor `spec` on tensor-parallel rank `rank`."""
    tp = config.tp_size
    rows = spec.shape[0] if spec.shape else 1
    if tp == 1 or spec.split is Split.COPY:
        return RankSlice(((0, rows),), None, 0)
    if spec.split is Split.COLUMNS:
        width = spec.shape[1] // tp
        return RankSlice(((0, rows),), (rank * width, (rank + 1) * width), 0)
    if spec.split is Split.QKV:
        return RankSlice(_qkv_rows(spec, config, rank), None, 0)
    share = -(-rows // tp)
    start, stop = min(rank * share, rows), min((rank + 1) * share, rows)
    return RankSlice(((start, stop),), None, share - (stop - start))


def _qkv_rows(spec: TensorSpec, config: CheckpointConfig, rank: int) -> tuple[tuple[int, int], ...]:
    """Row ranges of q, k and v on one rank. With fewer KV heads than ranks, consecutive ranks share a head."""
    tp, q_heads, kv_heads = config.tp_size, config.num_attention_heads, config.num_key_value_heads
    per_head = spec.shape[0] // (q_heads + 2 * kv_heads)
    q_count, kv_count = q_heads // tp, max(kv_heads // tp, 1)
    first_kv = rank * kv_heads // tp
    starts = (rank * q_count, q_heads + first_kv, q_heads + kv_heads + first_kv)
    counts = (q_count, kv_count, kv_count)
    return tuple((s * per_head, (s + n) * per_head) for s, n in zip(starts, counts, strict=True))


def divisibility_problems(config: CheckpointConfig, where: str | None = None) -> list[Problem]:
    """Reasons why this model cannot be split over `tp_size` ranks; empty if it can."""
    tp = config.tp_size
    remedy = "choose a tensor-parallel size that divides it"
    rules: list[tuple[str, int, str | None]] = [
        ("number of attention heads", config.num_attention_heads, None),
        ("intermediate size", config.intermediate_size, None),
    ]
    if config.use_parallel_embedding and config.embedding_sharding_dim == 1:
        rules.append(("hidden size", config.hidden_size, "the embedding is split by columns"))
    if config.drafter is not None:
        why = "TensorRT-LLM splits every drafter layer by rows"
        rules.append(("drafter's hidden size", config.drafter.hidden_size, why))
        rules.append(("drafter's exit_dim", config.drafter.exit_dim, why))
        why = "TensorRT-LLM's drafting indexes the unpadded vocabulary while its LM heads are padded"
        rules.append(("vocabulary (with a drafter)", config.vocab_size, why))
    found = [
        Problem(f"the {name}, {size}, cannot be divided by {tp} ranks", where, why, remedy)
        for name, size, why in rules
        if size % tp
    ]
    kv = config.num_key_value_heads
    if kv % tp and tp % kv:
        why = "each KV head must lie on a whole number of ranks, or each rank hold whole heads"
        found.append(Problem(f"{kv} KV heads cannot be divided by or repeated over {tp} ranks", where, why, remedy))
    return found
