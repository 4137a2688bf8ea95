"""The parity gate: does an engine compute what its checkpoint says, and does its drafter work?

The engine decodes a few prompts. Then the checkpoint's distributions are computed along the engine's own tokens, twice:
exactly, and in the checkpoint's dtype, which shows how far rounding moves them (`reference`). What is compared:

    config      fields of the engine's config.json that determine what is computed
    weights     bit for bit, where the engine holds them as tensors (torch)
    tokens      each must be the exact distribution's most likely token, or tie with it (`gate_checks`)
    logits      where the engine returns them (`distributions`), also along random tokens
    drafter     the scores of its drafts, where the engine returns them (`gate_drafter`)
    steps       replayed along the same tokens with TensorRT-LLM's search and rule (`replay`, `gate_acceptance`)

    report = parity_gate(GateRequest(engine, reference, prompts, ...))
    report.ok, report.render()

A sampling engine decodes at temperature 1, and less can be checked: see `gate_checks` and `replay`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_redrafter.backends import torch_device
from trtllm_redrafter.backends.engine_config import TENSORRT, TORCH
from trtllm_redrafter.checkpoint.config import read_checkpoint_config
from trtllm_redrafter.planning.sizes import weight_bytes
from trtllm_redrafter.verify.gate_acceptance import (
    SINGLE_STEPS,
    AcceptanceCheck,
    SingleSteps,
    StepCounts,
    tolerance,
)
from trtllm_redrafter.verify.gate_checks import TokenCheck, compare, sampled_alarms, token_alarms
from trtllm_redrafter.verify.gate_decode import Decoded, decode
from trtllm_redrafter.verify.gate_files import check_pair, check_weights, not_seen
from trtllm_redrafter.verify.gate_report import PROMPTS, GateReport, GateRequest

if TYPE_CHECKING:
    from trtllm_redrafter.backends.torch.runner import TorchRunner
    from trtllm_redrafter.redrafter.config import DraftShape
    from trtllm_redrafter.verify.distributions import Distributions
    from trtllm_redrafter.verify.gate_drafter import Drafts
    from trtllm_redrafter.verify.reference import Pair

__all__ = ["PROMPTS", "GateReport", "GateRequest", "parity_gate", "reference_device"]

REFERENCE_SHARE = 1.3
"""Memory of the reference over the model's bytes: logits, cache, and the replay's own drafter and embedding."""


def parity_gate(request: GateRequest) -> GateReport:
    """Decode with the engine, close it, then compute the reference, so that never both are in memory."""
    differing = check_pair(request.config, request.reference)  # raises if this is no engine, and says what it is
    _check_reference(request.reference)
    weights = check_weights(request.config, request.reference)
    sampled = _samples(request)
    decoded = decode(request, sampled=sampled)
    device = reference_device(request.reference)  # once, so that replay and reference are on the same device
    alarms, tokens = [*differing, *weights.problems], None
    distributions, drafts = None, None
    if decoded.texts:
        pair = _pair(request, decoded, device)
        if sampled:
            rows = (pair.exact.logits(place) for place in range(decoded.own))
            alarms += sampled_alarms(request.engine, rows, decoded.results)
        else:
            tokens = compare(request.engine, pair, decoded.results, quantized=_rounds_otherwise(request))
        distributions, drafts = _distributions(decoded, pair), _drafts(request, decoded)
    steps = None if decoded.shape is None else _steps(request, decoded, device, decoded.shape, sampled=sampled)
    alarms += token_alarms(request.engine, decoded.results, tokens)
    for found in (distributions, drafts):
        alarms += [] if found is None else found.problems(request.engine)
    if steps is not None and decoded.shape is not None:
        alarms += steps.alarms(request.engine, decoded.shape.draft_len, request.min_acceptance)
    notes = not_seen(request, distributions, drafts, decoded.refusal, has_drafter=decoded.shape is not None)
    return GateReport(
        request, tokens or TokenCheck(0, 0, 0, ()), tuple(alarms), steps, distributions, drafts, weights.checked,
        notes, tuple(tuple(result.token_ids) for result in decoded.results), sampled,
    )  # fmt: skip


def _check_reference(path: Path) -> None:
    """A damaged reference proves nothing; `InputError` says what `verify` would."""
    from trtllm_redrafter.checkpoint.reader import Checkpoint
    from trtllm_redrafter.checkpoint.structure import require_sound

    require_sound(Checkpoint.open(path))


def _samples(request: GateRequest) -> bool:
    """Does the engine sample? TensorRT-LLM compiles this into engines with a drafter; elsewhere requests decide."""
    config = read_checkpoint_config(request.reference)
    return request.config.backend == TENSORRT and config.drafter is not None and not config.greedy


def _rounds_otherwise(request: GateRequest) -> bool:
    """Does the engine quantize activations, as the reference does not? The torch backend dequantizes FP8 weights."""
    quantized = read_checkpoint_config(request.reference).quant_algo is not None
    return quantized and request.config.backend != TORCH


def _pair(request: GateRequest, decoded: Decoded, device: str) -> Pair:
    from trtllm_redrafter.checkpoint.reader import Checkpoint
    from trtllm_redrafter.verify.reference import compute_pair, tensorrt_qk_epsilon

    checkpoint = Checkpoint.open(request.reference)
    epsilon = tensorrt_qk_epsilon(checkpoint.config) if request.config.backend == TENSORRT else None
    return compute_pair(checkpoint, decoded.texts, device, qk_epsilon=epsilon)


def _distributions(decoded: Decoded, pair: Pair) -> Distributions | None:
    """The engine's logits against the pair's, for the tokens the engine was asked about."""
    from trtllm_redrafter.verify.distributions import measure

    if not decoded.logits:
        return None
    rows = ((found, *pair.rows(i, len(found))) for i, found in enumerate(decoded.logits))
    return measure(rows, pair.dtype)


def _drafts(request: GateRequest, decoded: Decoded) -> Drafts | None:
    from trtllm_redrafter.checkpoint.reader import Checkpoint
    from trtllm_redrafter.verify.gate_drafter import judge_drafts

    if decoded.drafted is None:
        return None
    checkpoint = Checkpoint.open(request.reference)
    return judge_drafts(*decoded.drafted, checkpoint, head_rows=request.config.head_rows)


def _steps(
    request: GateRequest, decoded: Decoded, device: str, shape: DraftShape, *, sampled: bool
) -> AcceptanceCheck:  # fmt: skip
    """The engine's steps against those its texts should take."""
    from trtllm_redrafter.verify.replay import load_replay

    quantized = read_checkpoint_config(request.reference).quant_algo is not None
    with _reference_runner(request, decoded.prompts, device) as reference:
        dtype = reference.info.dtype
        allowed = tolerance(dtype, quantized=quantized, sampled=sampled)
        replay = load_replay(request.config, request.reference, reference, shape, device, greedy=not sampled)
        pairs = zip(decoded.prompts, decoded.results, strict=True)
        texts = [replay.steps(prompt, result.token_ids) for prompt, result in pairs]
    found, expected = StepCounts.of_results(decoded.results), StepCounts.of_replay(texts, shape.draft_len)
    single = SingleSteps.of(decoded.accepted, [text.accepted for text in texts])
    single_allowed = max(SINGLE_STEPS[dtype], allowed)
    return AcceptanceCheck(
        found, expected, sum(text.diverged for text in texts), allowed, sampled, single, single_allowed
    )  # fmt: skip


def reference_device(checkpoint: Path) -> str:
    """The GPU if the whole model in 16 bits fits into the free memory of one, else the CPU.

    The reference of an engine over several GPUs may fit none of them, and a slow check is better than running out of
    memory after hours of building.
    """
    device = torch_device()
    if device == "cpu":
        return device
    import torch

    whole = weight_bytes(replace(read_checkpoint_config(checkpoint), tp_size=1, quantization={})).total
    free, _ = torch.cuda.mem_get_info()
    return device if REFERENCE_SHARE * whole <= free else "cpu"


@contextmanager
def _reference_runner(request: GateRequest, prompts: Sequence[tuple[int, ...]], device: str) -> Iterator[TorchRunner]:
    """The checkpoint on the torch backend, closed and removed afterwards."""
    from trtllm_redrafter.backends.torch.temporary import temporary_directory, temporary_runner

    longest = max(len(prompt) for prompt in prompts)
    with temporary_directory(beside=request.reference) as folder:
        engine = temporary_runner(
            request.reference, folder, max_batch_size=len(prompts), max_input_len=longest,
            max_seq_len=longest + request.max_tokens, device=device,
        )  # fmt: skip
        with engine as runner:
            yield runner
