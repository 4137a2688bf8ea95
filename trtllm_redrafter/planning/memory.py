"""What fits on the GPU: weights, drafting buffers, activations, and the remaining KV cache.

ReDrafter's buffers are surprisingly large: the draft probabilities alone are batch x beams x length x vocabulary, in
and out, so that TensorRT-LLM's default of 2048 requests takes 13 GB each way. Every line of a plan is a product that
can be checked by hand; docs/planning.md explains them. Weights are counted by the table that defines a checkpoint's
layout, so there are no formulas per model family. Activations and the reserve are estimates and labelled so.

    weights = weight_bytes(config)        # of the largest rank: weights.base, weights.drafter
    plan = estimate_memory(config, BuildLimits(8, 2047, 2048, 2229), gpu("h100-80gb"), kv_cache_fraction=0.9)
    print(plan.render())
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.layout import TensorSpec, rank_slice, tensor_specs
from trtllm_redrafter.checkpoint.names import DRAFTER, EMBEDDING, LM_HEAD
from trtllm_redrafter.errors import Problem
from trtllm_redrafter.planning.gpus import GB, Gpu

STORED_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
_UNKNOWN_SCHEME_BYTES: Mapping[str, float] = {"W8A16": 1, "W4A16": 0.5, "MIXED_PRECISION": 1}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes on one rank. A decoding step reads `base` in full; the embedding is stored, but read row by row."""

    base: int
    embedding: int
    drafter: int
    draft_head: int
    """Part of `drafter`: its LM head."""

    @property
    def total(self) -> int:
        return self.base + self.embedding + self.drafter


def dtype_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def weight_bytes(config: CheckpointConfig) -> WeightBytes:
    """Rank 0's share; ranks are equal but for padding."""
    base = embedding = drafter = draft_head = 0
    tied = config.tie_word_embeddings and config.tp_size == 1  # the builder then keeps one copy
    for name, spec in tensor_specs(config).items():
        if spec.optional and name.startswith("transformer.layers."):
            continue  # optional scales: a few bytes
        size = _rank_bytes(spec, config)
        if name.startswith(DRAFTER):
            drafter += size
            draft_head += size if name == DRAFTER + LM_HEAD else 0
        elif name == EMBEDDING:
            embedding += 0 if tied else size
        else:
            base += size
    return WeightBytes(base, embedding, drafter, draft_head)


def _rank_bytes(spec: TensorSpec, config: CheckpointConfig) -> int:
    count = math.prod(rank_slice(spec, config, 0).shape(spec.shape))
    each: float = STORED_BYTES.get(spec.dtype, 4)
    if not spec.checked:
        each = _UNKNOWN_SCHEME_BYTES.get(config.quant_algo or "", each)
    return math.ceil(count * each)


def kv_bytes_per_token(config: CheckpointConfig) -> int:
    """Keys and values of all layers on one rank; KV heads are repeated if there are fewer than ranks."""
    heads = -(-config.num_key_value_heads // config.tp_size)
    each = {"FP8": 1, "INT8": 1}.get(config.kv_cache_quant_algo or "", dtype_bytes(config.dtype))
    return 2 * config.num_hidden_layers * heads * config.head_size * each


def base_parameters(config: CheckpointConfig) -> int:
    """Parameters multiplied with every token, over all ranks: layers and LM head, without embedding and norms."""
    h, d = config.hidden_size, config.head_size
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    layer = h * (q + 2 * kv) + q * h + 3 * h * config.intermediate_size
    return config.num_hidden_layers * layer + config.padded_vocab_size * h


def drafter_parameters(config: CheckpointConfig) -> int:
    """Parameters multiplied with every drafted position."""
    if config.drafter is None:
        return 0
    return sum(math.prod(shape) for shape in config.drafter.parameter_shapes().values() if len(shape) == 2)


RESERVE = int(1.5 * GB)
"""Estimate, not measured: CUDA context, workspaces of cuBLAS and NCCL, TensorRT's own memory."""

ACTIVATION_COPIES = 1.25
"""Estimate: memory TensorRT's activation planner needs, relative to the widest stage of a layer."""

LOW_KV_SHARE = 0.05
"""Share of the GPU below which the cache is so small that an error of the estimates may exceed it."""

COMPILED_WITH = ("base weights", "embedding", "drafter weights", "activations")


@dataclass(frozen=True)
class BuildLimits:
    """The sizes an engine is built for. `max_num_tokens` limits the tokens of one step, over all requests."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int


@dataclass(frozen=True)
class MemoryItem:
    """One consumer of memory, and how its size is calculated."""

    name: str
    nbytes: int
    how: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one rank on one GPU."""

    gpu: Gpu
    limits: BuildLimits
    ranks: int
    lines: tuple[MemoryItem, ...]
    kv_cache_fraction: float
    kv_bytes_per_token: int
    tree_tokens: int
    build_host_bytes: int
    """Estimate of main memory on the build machine: a rank's weights as read and as serialized."""

    @property
    def used_bytes(self) -> int:
        return sum(line.nbytes for line in self.lines)

    @property
    def build_gpu_bytes(self) -> int:
        """Minimum for compiling; with more free memory, TensorRT can try more kernels."""
        return sum(line.nbytes for line in self.lines if line.name in COMPILED_WITH)

    @property
    def free_bytes(self) -> int:
        return self.gpu.memory_bytes - self.used_bytes

    @property
    def kv_bytes(self) -> int:
        return max(0, int(self.free_bytes * self.kv_cache_fraction))

    @property
    def kv_tokens(self) -> int:
        return self.kv_bytes // self.kv_bytes_per_token

    @property
    def longest_request(self) -> int:
        """Cache positions of a request of full length, including a tree under verification at its end."""
        return self.limits.max_seq_len + self.tree_tokens - 1

    @property
    def full_requests(self) -> int:
        """Number of full-length requests that fit at the same time."""
        return self.kv_tokens // self.longest_request

    def problems(self) -> list[Problem]:
        """Reasons why this cannot run on the GPU."""
        where = f"{self.ranks} x {self.gpu.title}" if self.ranks > 1 else self.gpu.title
        if self.free_bytes <= 0:
            why = f"{_gb(self.used_bytes)} are needed before the KV cache, the GPU has {_gb(self.gpu.memory_bytes)}"
            largest = max(self.lines, key=lambda line: line.nbytes)
            remedy = f"the largest part is {largest.name}; use more ranks, FP8 weights, or a smaller batch and tree"
            return [Problem("the engine does not fit", where, why, remedy)]
        if self.full_requests < 1:
            why = f"the KV cache holds {self.kv_tokens} tokens, one request may need {self.longest_request}"
            return [Problem("not one request of full length fits", where, why, "lower build.max_seq_len")]
        return []

    def warnings(self) -> list[Problem]:
        """Reasons why this fits, but may not run as intended."""
        where, found = self.gpu.title, []
        if self.problems():
            return []
        if self.full_requests < self.limits.max_batch_size:
            what = f"{self.full_requests} requests of full length fit, max_batch_size is {self.limits.max_batch_size}"
            why = "further ones wait or are paused while the cache is full"
            found.append(Problem(what, where, why, "use an FP8 KV cache, or lower build.max_seq_len or the batch"))
        if self.kv_bytes < LOW_KV_SHARE * self.gpu.memory_bytes:
            why = f"{_gb(self.kv_bytes)}: activations and the reserve are estimates, and may be off by as much"
            found.append(Problem("little memory is left for the KV cache", where, why, "use more ranks or FP8 weights"))
        return found

    def render(self) -> str:
        width = max(len(line.name) for line in self.lines)
        head = f"memory of each of {self.ranks} rank(s) on {self.gpu.title}, {_gb(self.gpu.memory_bytes)}"
        rows = [f"  {line.name:<{width}}  {_gb(line.nbytes):>9}  {line.how}" for line in self.lines]
        kv = f"{self.kv_cache_fraction:g} of the {_gb(self.free_bytes)} left: {self.kv_tokens} tokens"
        rows.append(f"  {'KV cache':<{width}}  {_gb(self.kv_bytes):>9}  {kv} of {self.kv_bytes_per_token:,} bytes")
        fits = f"{self.full_requests} requests of {self.longest_request} positions at the same time"
        rows.append(f"  {'fits':<{width}}  {'':>9}  {fits}")
        compiling = "weights and activations while compiling; TensorRT tries kernels in what is left"
        rows.append(f"  {'build GPU':<{width}}  {_gb(self.build_gpu_bytes):>9}  {compiling}")
        rows.append(
            f"  {'build host':<{width}}  {_gb(self.build_host_bytes):>9}  main memory per rank built (estimate)"
        )
        return "\n".join([head, *rows])

    def as_dict(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.name,
            "gpu_bytes": self.gpu.memory_bytes,
            "ranks": self.ranks,
            "lines": [{"name": line.name, "bytes": line.nbytes, "how": line.how} for line in self.lines],
            "kv_bytes": self.kv_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_tokens": self.kv_tokens,
            "full_requests": self.full_requests,
            "build_gpu_bytes": self.build_gpu_bytes,
            "build_host_bytes": self.build_host_bytes,
        }


def estimate_memory(
    config: CheckpointConfig, limits: BuildLimits, target: Gpu, *, kv_cache_fraction: float
) -> MemoryEstimate:
    """The memory of one rank."""
    weights = weight_bytes(config)
    lines = [
        MemoryItem("base weights", weights.base, "layers and LM head of this rank"),
        MemoryItem(
            "embedding", weights.embedding, "whole on every rank" if not config.use_parallel_embedding else "shared"
        ),
    ]
    if config.drafter is not None:
        lines.append(
            MemoryItem("drafter weights", weights.drafter, f"of this rank, its LM head {_gb(weights.draft_head)}")
        )
        lines += _drafting(config, limits.max_batch_size)
    lines.append(_activations(config, limits.max_num_tokens))
    lines.append(MemoryItem("reserve", RESERVE, "estimate: CUDA, cuBLAS, NCCL, TensorRT"))
    shape = config.draft_shape
    return MemoryEstimate(
        gpu=target,
        limits=limits,
        ranks=config.tp_size,
        lines=tuple(lines),
        kv_cache_fraction=kv_cache_fraction,
        kv_bytes_per_token=kv_bytes_per_token(config),
        tree_tokens=1 if shape is None else shape.max_tree_tokens,
        build_host_bytes=2 * weights.total,
    )


def _drafting(config: CheckpointConfig, batch: int) -> list[MemoryItem]:
    """Buffers that grow with batch x vocabulary. Every rank has them in full, since the heads' outputs are gathered."""
    shape, each, vocab = config.draft_shape, dtype_bytes(config.dtype), config.vocab_size
    assert shape is not None
    beams, length, rows = shape.num_beams, shape.draft_len, shape.max_tree_tokens
    probabilities = batch * beams * length * vocab * each
    verification = batch * rows * vocab * each + batch * beams * (length + 1) * vocab * each
    beam_search = 3 * batch * beams * vocab * each
    return [
        MemoryItem("draft probabilities", 2 * probabilities, f"in and out: 2 x {batch} x {beams} x {length} x {vocab}"),
        MemoryItem(
            "verification", verification, f"logits of {batch} x {rows} rows, and {beams} x {length + 1} per request"
        ),
        MemoryItem("beam search", beam_search, f"logits, log-probabilities, scores: 3 x {batch} x {beams} x {vocab}"),
    ]


def _activations(config: CheckpointConfig, tokens: int) -> MemoryItem:
    """The widest stage of a layer: the gated MLP or attention, with the hidden states in memory beside it."""
    tp, h = config.tp_size, config.hidden_size
    heads = config.num_attention_heads + 2 * -(-config.num_key_value_heads // tp) * tp
    mlp = 3 * config.intermediate_size // tp
    attention = (heads + config.num_attention_heads) * config.head_size // tp
    width = 3 * h + max(mlp, attention)
    nbytes = int(ACTIVATION_COPIES * tokens * width * dtype_bytes(config.dtype))
    return MemoryItem("activations", nbytes, f"estimate: {tokens} tokens x {width} values")


def _gb(count: int) -> str:
    return f"{count / GB:.2f} GB"
