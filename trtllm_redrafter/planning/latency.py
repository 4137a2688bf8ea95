"""Time of a decoding step, plain and with ReDrafter, from bytes moved and arithmetic (a roofline model).

A matrix product moves its bytes and does its arithmetic, each at a share of the peak and partly overlapped, and every
kernel has a fixed cost. Decoding one request reads all weights for a single row, so verifying more rows is nearly free,
until the rows of a whole batch take longer to compute than the weights take to read. Drafting is not free: the
drafter's LM head is read once per drafted position. The ratio of the two step times is the break-even acceptance
length, above which drafting pays:

    plan = estimate_latency(config, gpu("h100-80gb"), assumptions, batch_sizes=(1, 8), max_batch_size=8)
    plan.rows[0].break_even            # 1.77 tokens per step
    plan.rows[0].speedup(2.9)          # 1.64
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.planning.gpus import Gpu
from trtllm_redrafter.planning.memory import (
    base_parameters,
    drafter_parameters,
    dtype_bytes,
    kv_bytes_per_token,
    weight_bytes,
)

KERNELS_PER_LAYER = 10
"""Norms, projections, attention, activation, residuals; some are fused, some split."""

KERNELS_PER_DRAFT = 84
"""Per drafted position: RNN, blocks, LM head, top-50, log-softmax, two top-k, gathers. Derived from 180 to 200 us on
top of reading the weights, measured with the torch backend's graphs on an H200 (benchmarks/results/gpu_steps.json)."""

DEAR_SHARE = 0.25
"""Of a plain step: a search that takes more asks for a slimmer drafter before anything else."""

LINK_LATENCY_US = 10.0
"""Assumed latency of one all-reduce over NVLink, in addition to moving its bytes."""

VOCABULARY_PASSES = 6
"""Passes over a drafted position's [beams, vocabulary] array: logits, cut, softmax, top-k, output."""


@dataclass(frozen=True)
class Assumptions:
    """Inputs the roofline cannot derive; the recipe's `plan` section holds the defaults."""

    context_len: int
    bandwidth_efficiency: float
    compute_efficiency: float
    kernel_us: float


@dataclass(frozen=True)
class LatencyRow:
    """Step times at one batch size, in milliseconds."""

    batch: int
    plain_ms: float
    verify_ms: float
    draft_ms: float

    @property
    def redrafter_ms(self) -> float:
        return self.verify_ms + self.draft_ms

    @property
    def break_even(self) -> float:
        """Acceptance length above which drafting is faster."""
        return self.redrafter_ms / self.plain_ms

    def speedup(self, acceptance_length: float) -> float:
        return acceptance_length / self.break_even

    @property
    def dear(self) -> bool:
        """Does the search take more than a quarter of a plain step?"""
        return self.draft_ms > DEAR_SHARE * self.plain_ms


@dataclass(frozen=True)
class SlimmerRow:
    """A request alone with a drafter of another `exit_dim`, all else equal. It would have to be trained."""

    exit_dim: int
    row: LatencyRow


@dataclass(frozen=True)
class LatencyEstimate:
    """Step times by batch size."""

    gpu: Gpu
    ranks: int
    rows: tuple[LatencyRow, ...]
    assumptions: Assumptions
    acceptance_length: float | None
    slimmer: tuple[SlimmerRow, ...] = ()

    def render(self) -> str:
        a, accepted = self.assumptions, self.acceptance_length
        lines = [
            f"time of a decoding step on {self.ranks} x {self.gpu.title}, {a.context_len} tokens per request cached",
            f"  assumed: {a.bandwidth_efficiency:g} of the bandwidth, {a.compute_efficiency:g} of the arithmetic, "
            f"{a.kernel_us:g} us per kernel; TensorRT-LLM was not measured",
            f"  {'batch':>5} {'plain':>9} {'verify':>9} {'draft':>9} {'break-even':>11}"
            + ("" if accepted is None else f" {'speed-up at ' + format(accepted, '.2f'):>18}"),
        ]
        for row in self.rows:
            text = f"  {row.batch:>5} {row.plain_ms:>6.2f} ms {row.verify_ms:>6.2f} ms {row.draft_ms:>6.2f} ms"
            text += f" {row.break_even:>11.2f}"
            lines.append(text + ("" if accepted is None else f" {row.speedup(accepted):>18.2f}"))
        if accepted is None:
            lines.append(
                "  break-even: tokens per step from which drafting is faster; `evaluate` measures what you have"
            )
        return "\n".join([*lines, *self._render_slimmer()])

    def _render_slimmer(self) -> list[str]:
        if not self.slimmer:
            return []
        lines = ["  slimmer drafters, to be trained, batch 1:"]
        for slim in self.slimmer:
            text = f"    exit_dim {slim.exit_dim:>5}: {slim.row.draft_ms:.2f} ms a search, break-even "
            text += f"{slim.row.break_even:.2f}"
            if self.acceptance_length is not None:
                now = self.rows[0]
                equal = self.acceptance_length * slim.row.break_even / now.break_even
                text += f"; as fast as now at {equal:.2f} tokens per step"
            lines.append(text)
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.name,
            "ranks": self.ranks,
            "assumptions": dict(vars(self.assumptions)),
            "acceptance_length": self.acceptance_length,
            "rows": [{**vars(row), "break_even": row.break_even, "speedup": self._speedup(row)} for row in self.rows],
            "slimmer": [
                {"exit_dim": slim.exit_dim, **vars(slim.row), "break_even": slim.row.break_even}
                for slim in self.slimmer
            ],
        }

    def _speedup(self, row: LatencyRow) -> float | None:
        return None if self.acceptance_length is None else row.speedup(self.acceptance_length)


def batch_sizes(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the limit itself."""
    powers = [2**i for i in range(limit.bit_length()) if 2**i < limit]
    return (*powers, limit)


def estimate_latency(
    config: CheckpointConfig,
    target: Gpu,
    assumptions: Assumptions,
    *,
    max_batch_size: int,
    acceptance_length: float | None,
) -> LatencyEstimate:
    """Step times for batch sizes up to `max_batch_size`."""
    roof = _Roof(config, target, assumptions)
    shape = config.draft_shape
    rows = []
    for batch in batch_sizes(max_batch_size):
        plain = roof.base_step(batch, 1)
        verify = plain if shape is None else roof.base_step(batch, shape.max_tree_tokens)
        draft = 0.0 if shape is None else roof.drafting(batch)
        rows.append(LatencyRow(batch, 1e3 * plain, 1e3 * verify, 1e3 * draft))
    slimmer = _slimmer(config, target, assumptions, rows[0])
    return LatencyEstimate(target, config.tp_size, tuple(rows), assumptions, acceptance_length, slimmer)


def _slimmer(
    config: CheckpointConfig, target: Gpu, assumptions: Assumptions, now: LatencyRow
) -> tuple[SlimmerRow, ...]:
    """What the widths H, H/2 and H/4 would cost, as far as they are below the drafter's own."""
    found = []
    for part in (1, 2, 4):
        width = config.hidden_size // part
        if config.drafter is not None and width < config.drafter.exit_dim and width % config.tp_size == 0:
            slim = replace(config, drafter=replace(config.drafter, exit_dim=width))
            draft_ms = 1e3 * _Roof(slim, target, assumptions).drafting(1)
            found.append(SlimmerRow(width, LatencyRow(1, now.plain_ms, now.verify_ms, draft_ms)))
    return tuple(found)


def _overlapped(reading: float, computing: float) -> float:
    """Seconds of a product. Reading and computing overlap only in part: with the recipe's shares of the peaks, this is
    within 9 % of the times measured on an H200 for 1 to 512 rows (benchmarks/results/gpu_steps.json)."""
    return math.hypot(reading, computing)


class _Roof:
    """Times in seconds for one model on one kind of GPU."""

    def __init__(self, config: CheckpointConfig, target: Gpu, assumptions: Assumptions) -> None:
        self._config = config
        self._weights = weight_bytes(config)
        self._bandwidth = target.bandwidth * assumptions.bandwidth_efficiency
        self._link = target.link_bandwidth * assumptions.bandwidth_efficiency
        fp8 = config.quant_algo == "FP8"
        self._base_rate = target.flops(fp8=fp8) * assumptions.compute_efficiency
        self._dense_rate = target.flops(fp8=False) * assumptions.compute_efficiency
        self._context = assumptions.context_len
        self._kernel = 1e-6 * assumptions.kernel_us

    def base_step(self, batch: int, rows: int) -> float:
        """One forward pass of the base model over `rows` tokens of each of `batch` requests."""
        config, tp = self._config, self._config.tp_size
        arithmetic = 2 * batch * rows * base_parameters(config) / tp / self._base_rate
        weights = _overlapped(self._weights.base / self._bandwidth, arithmetic)
        cache = batch * self._context * kv_bytes_per_token(config) / self._bandwidth
        width = config.num_attention_heads * config.head_size // tp
        scores = 4 * batch * rows * self._context * width * config.num_hidden_layers / self._dense_rate
        fixed = self._kernel * KERNELS_PER_LAYER * config.num_hidden_layers
        return weights + max(cache, scores) + fixed + self._all_reduces(batch * rows)

    def drafting(self, batch: int) -> float:
        """All rounds of the drafter; the first has one row per request, later ones one per beam."""
        config, shape = self._config, self._config.draft_shape
        assert shape is not None
        total = 0.0
        for depth in range(shape.draft_len):
            rows = batch * (1 if depth == 0 else shape.num_beams)
            arithmetic = 2 * rows * drafter_parameters(config) / config.tp_size / self._dense_rate
            weights = _overlapped(self._weights.drafter / self._bandwidth, arithmetic)
            arrays = VOCABULARY_PASSES * rows * config.vocab_size * dtype_bytes(config.dtype) / self._bandwidth
            total += weights + arrays + self._kernel * KERNELS_PER_DRAFT + self._gather(rows)
        return total

    def _all_reduces(self, tokens: int) -> float:
        """Two all-reduces per layer; a ring sends each byte about twice."""
        if self._config.tp_size == 1:
            return 0.0
        nbytes = tokens * self._config.hidden_size * dtype_bytes(self._config.dtype)
        tp = self._config.tp_size
        each = 1e-6 * LINK_LATENCY_US + 2 * (tp - 1) / tp * nbytes / self._link
        return 2 * self._config.num_hidden_layers * each

    def _gather(self, rows: int) -> float:
        """Gathering the drafter's layers, which are split by rows, and its LM head's logits over the vocabulary."""
        tp = self._config.tp_size
        if tp == 1 or self._config.drafter is None:
            return 0.0
        nbytes = rows * self._config.vocab_size * dtype_bytes(self._config.dtype) * (tp - 1) / tp
        return 1e-6 * LINK_LATENCY_US * (3 + self._config.drafter.num_layers) + nbytes / self._link
