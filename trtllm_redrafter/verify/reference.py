"""What a checkpoint's base model computes along given texts, exactly and in its own dtype.

An engine may differ from exact arithmetic by its dtype's rounding errors, and by no more. Their size depends on the
model, the text and the position, so it is computed and not assumed: the same weights run through plain PyTorch in a
wider dtype (float32 for 16 bits, float64 for float32) and in their own. That is one way of rounding among many, and an
engine rounds in another; so the wider dtype runs a few more times with every intermediate result randomly perturbed by
as much as the narrower dtype would round it.

    reference = reference_logits(Checkpoint.open(path), texts, device)
    reference.exact.logits(0), reference.rounded.logits(0), reference.perturbed[0].logits(0)        # [n, V] each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from trtllm_redrafter.backends.torch.pointwise import EAGER, Pointwise
from trtllm_redrafter.backends.torch.transformer import TorchExecutor
from trtllm_redrafter.backends.torch.weights import DTYPES, load_weights
from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.planning.memory import weight_bytes

EXACT = {"float16": torch.float32, "bfloat16": torch.float32, "float32": torch.float64}
"""The dtype that counts as exact for each: at least 2^13 times finer."""

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

PERTURBATIONS = 3
"""More make the unit steadier: with rounding alone, an intact engine was up to 3.2 units off at some position."""

STREAM_ABOVE = 4 * 10**9
"""Bytes of a 16-bit model above which layers are read and cast one at a time, once per text."""

TENSORRT_QK_EPSILON = 1e-5
"""TensorRT-LLM 1.2 builds Qwen3's q and k norms with the layer's default epsilon, not the model's (1e-6)."""


@dataclass(frozen=True)
class Text:
    """A prompt, and the tokens after it whose distributions are compared; the first comes from the prompt's pass."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ComputedLogits:
    """Final hidden states of every text, and the LM head that turns them into logits."""

    states: tuple[Tensor, ...]  # [n, H] per text; row j predicts the text's token j
    head: Tensor  # [V, H]

    def logits(self, text: int) -> Tensor:
        """[n, V] in float32, or in float64 if that was computed."""
        logits = F.linear(self.states[text], self.head)
        return logits if logits.dtype is torch.float64 else logits.float()


@dataclass(frozen=True)
class StoredLogits:
    """Logits of every text, stored."""

    rows: tuple[Tensor, ...]

    def logits(self, text: int) -> Tensor:
        return self.rows[text]


@dataclass(frozen=True)
class ReferenceLogits:
    """The same texts and weights in the wider dtype, in the model's own, and in the wider one with perturbations."""

    dtype: str
    exact: ComputedLogits | StoredLogits
    rounded: ComputedLogits | StoredLogits
    perturbed: tuple[ComputedLogits | StoredLogits, ...]

    def rows(self, text: int, count: int | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Exact, rounded and perturbed logits [count, V] of a text's first tokens."""
        exact, rounded = self.exact.logits(text)[:count], self.rounded.logits(text)[:count]
        return exact, rounded, [computed.logits(text)[:count] for computed in self.perturbed]


def reference_logits(
    checkpoint: Checkpoint, texts: Sequence[Text], device: str, *, qk_epsilon: float | None = None
) -> ReferenceLogits:
    """Run all computations, one after the other. Raises like `load_weights` (quantization other than FP8)."""
    dtype = checkpoint.config.dtype

    def computed(wanted: torch.dtype, pointwise: Pointwise = EAGER) -> ComputedLogits:
        return _compute(checkpoint, texts, device, wanted, qk_epsilon, pointwise)

    perturbed = tuple(computed(EXACT[dtype], _perturbing(seed, dtype)) for seed in range(PERTURBATIONS))
    return ReferenceLogits(dtype, computed(EXACT[dtype]), computed(DTYPES[dtype]), perturbed)


def perturb(values: Tensor, dtype: str, generator: torch.Generator) -> Tensor:
    """Move each value randomly, by at most what rounding to `dtype` would."""
    noise = torch.rand(values.shape, generator=generator, dtype=torch.float32).to(values) * 2 - 1
    return values * (1 + UNIT_ROUNDOFF[dtype] * noise)


def _perturbing(seed: int, dtype: str) -> Pointwise:
    generator = torch.Generator().manual_seed(seed)

    def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        x, normed = EAGER.add_norm(perturb(x, dtype, generator), delta, weight, epsilon)
        return x, perturb(normed, dtype, generator)

    def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
        return perturb(EAGER.silu_and_mul(gate, up), dtype, generator)

    return replace(EAGER, add_norm=add_norm, silu_and_mul=silu_and_mul)


@torch.no_grad()
def _compute(
    checkpoint: Checkpoint, texts: Sequence[Text], device: str, dtype: torch.dtype, qk_epsilon: float | None,
    pointwise: Pointwise,
) -> ComputedLogits:  # fmt: skip
    streamed = weight_bytes(replace(checkpoint.config, tp_size=1, quantization={})).total > STREAM_ABOVE
    weights = load_weights(checkpoint, torch.device(device), dtype=dtype, streamed=streamed)
    longest = max(len(text.prompt) + len(text.tokens) for text in texts)
    executor = TorchExecutor(
        checkpoint.config, weights, max_batch_size=1, capacity=longest, pointwise=pointwise, qk_epsilon=qk_epsilon
    )
    states = [
        executor.hidden_states(0, (*text.prompt, *text.tokens[:-1]))[len(text.prompt) - 1 :].clone() for text in texts
    ]
    head = weights.head
    executor.close()
    return ComputedLogits(tuple(states), head)


def tensorrt_qk_epsilon(config: CheckpointConfig) -> float | None:
    """The epsilon TensorRT-LLM gives this model's q/k norms, if that is not the model's own."""
    differs = config.has_qk_norm and config.norm_epsilon != TENSORRT_QK_EPSILON
    return TENSORRT_QK_EPSILON if differs else None
