"""The parity gate: does an engine compute what its checkpoint says, and does its drafter work?

The engine decodes a few prompts. Then the checkpoint's distributions are computed along the engine's own tokens, twice:
exactly, and in the checkpoint's dtype, which shows how far rounding moves them (`reference`). What is compared:

    config      fields of the engine's config.json that determine what is computed
    weights     bit for bit, where the engine holds them as tensors (torch)
    tokens      each must be the exact distribution's most likely token, or tie with it (`token_checks`)
    logits      where the engine returns them (`distributions`), also along random tokens
    drafter     the scores of its drafts, where the engine returns them (`gate_drafter`)
    steps       replayed along the same tokens with TensorRT-LLM's search and rule (`steps`)

    report = parity_gate(GateRequest(engine, reference, prompts, ...))
    report.ok, report.render()

A sampling engine decodes at temperature 1, and less can be checked: see `token_checks` and `steps`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from trtllm_redrafter.backends import torch_device
from trtllm_redrafter.backends.engine_config import TENSORRT, TORCH, EngineConfig
from trtllm_redrafter.backends.torch.temporary import temporary_runner
from trtllm_redrafter.checkpoint.config import CheckpointConfig, read_checkpoint_config
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import ENGINE_CHECKPOINT
from trtllm_redrafter.checkpoint.structure import require_sound
from trtllm_redrafter.errors import MismatchError, Problem
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.planning.memory import weight_bytes
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.verify.distributions import DistributionCheck, check_distributions
from trtllm_redrafter.verify.gate_decode import Decoded, decode
from trtllm_redrafter.verify.gate_drafter import DraftCheck, check_drafts
from trtllm_redrafter.verify.gate_report import PROMPTS, GateReport, GateRequest
from trtllm_redrafter.verify.reference import reference_logits, tensorrt_qk_epsilon
from trtllm_redrafter.verify.steps import SINGLE_STEPS, AcceptanceCheck, SingleSteps, StepCounts, load_replay, tolerance
from trtllm_redrafter.verify.token_checks import TokenCheck, check_tokens, sampled_alarms, token_alarms
from trtllm_redrafter.verify.weights import compare_checkpoints

__all__ = ["PROMPTS", "GateReport", "GateRequest", "parity_gate", "reference_device"]

REFERENCE_SHARE = 1.3
"""Memory of the reference over the model's bytes: logits, cache, and the replay's own drafter and embedding."""


SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
"""If these differ, engine and checkpoint are of different models, and nothing else is compared."""

MEANINGS = (
    "dtype", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_size", "norm_epsilon",
    "hidden_act", "rotary_base", "rotary_scaling", "qwen_type", "attn_bias", "mlp_bias", "quantization",
    "redrafter_num_layers", "redrafter_hidden_size", "redrafter_exit_dim", "redrafter_is_rnn",
    "redrafter_greedy_search",
)  # fmt: skip
"""If these differ, the engine computes something else. Only fields in both files are compared."""


def parity_gate(request: GateRequest) -> GateReport:
    """Decode with the engine, close it, then compute the reference, so that the two are never in memory together."""
    differing = check_config(request.config, request.reference)  # raises if `engine` is not an engine
    require_sound(request.checkpoint)  # a damaged reference proves nothing
    compared, changed = check_weights(request.config, request.reference)
    model, on_trtllm = request.checkpoint.config, request.config.backend == TENSORRT
    sampled = _samples(request)
    decoded = decode(request, sampled=sampled)
    device = reference_device(model)  # once, so that replay and reference are on the same device
    alarms, tokens = [*differing, *changed], None
    distributions, drafts = None, None
    if decoded.texts:
        epsilon = tensorrt_qk_epsilon(model) if on_trtllm else None
        reference = reference_logits(request.checkpoint, decoded.texts, device, qk_epsilon=epsilon)
        if sampled:
            exact = (reference.exact.logits(place) for place in range(decoded.own))
            alarms += sampled_alarms(request.engine, exact, decoded.results)
        else:  # the other backends dequantize FP8 weights, as the reference does
            quantized = model.quant_algo is not None and on_trtllm
            tokens = check_tokens(request.engine, reference, decoded.results, quantized=quantized)
        if decoded.logits:
            rows = ((found, *reference.rows(i, len(found))) for i, found in enumerate(decoded.logits))
            distributions = check_distributions(rows, reference.dtype)
        if decoded.drafted is not None:
            drafts = check_drafts(*decoded.drafted, request.checkpoint, head_rows=request.config.head_rows)
    steps = None if decoded.shape is None else _steps(request, decoded, device, decoded.shape, sampled=sampled)
    alarms += token_alarms(request.engine, decoded.results, tokens)
    for found in (distributions, drafts):
        alarms += [] if found is None else found.problems(request.engine)
    if steps is not None and decoded.shape is not None:
        alarms += steps.alarms(request.engine, decoded.shape.draft_len, request.min_acceptance)
    notes = not_seen(request, distributions, drafts, decoded.refusal, has_drafter=decoded.shape is not None)
    return GateReport(
        request, tokens or TokenCheck(0, 0, 0, ()), tuple(alarms), steps, distributions, drafts, compared,
        notes, tuple(tuple(result.token_ids) for result in decoded.results), sampled,
    )  # fmt: skip


def _samples(request: GateRequest) -> bool:
    """Does the engine sample? TensorRT-LLM compiles this into engines with a drafter; elsewhere requests decide."""
    model = request.checkpoint.config
    return request.config.backend == TENSORRT and model.drafter is not None and not model.greedy


def _steps(
    request: GateRequest, decoded: Decoded, device: str, shape: DraftShape, *, sampled: bool
) -> AcceptanceCheck:  # fmt: skip
    """The engine's steps against those its texts should take."""
    quantized = request.checkpoint.config.quant_algo is not None
    longest = max(map(len, decoded.prompts))
    engine = temporary_runner(
        request.reference, max_batch_size=len(decoded.prompts), max_input_len=longest,
        max_seq_len=longest + request.max_tokens, device=device,
    )  # fmt: skip
    with engine as reference:
        dtype = reference.info.dtype
        allowed = tolerance(dtype, quantized=quantized, sampled=sampled)
        replay = load_replay(request.config, request.checkpoint, reference, shape, device, greedy=not sampled)
        pairs = zip(decoded.prompts, decoded.results, strict=True)
        texts = [replay.steps(prompt, result.token_ids) for prompt, result in pairs]
    found, expected = StepCounts.of_results(decoded.results), StepCounts.of_replay(texts, shape.draft_len)
    single = SingleSteps.of(decoded.accepted, [text.accepted for text in texts])
    single_allowed = max(SINGLE_STEPS[dtype], allowed)
    return AcceptanceCheck(
        found, expected, sum(text.diverged for text in texts), allowed, sampled, single, single_allowed
    )  # fmt: skip


def reference_device(model: CheckpointConfig) -> str:
    """The GPU if the whole model in 16 bits fits into the free memory of one, else the CPU.

    The reference of an engine over several GPUs may fit none of them, and a slow check is better than running out of
    memory after hours of building.
    """
    device = torch_device()
    if device == "cpu":
        return device
    whole = weight_bytes(replace(model, tp_size=1, quantization={})).total
    free, _ = torch.cuda.mem_get_info()
    return device if REFERENCE_SHARE * whole <= free else "cpu"


def check_config(engine: EngineConfig, reference: Path) -> list[Problem]:
    """Differing fields of the two config files. `MismatchError` if they are of different models."""
    config, found, where = read_checkpoint_config(reference), engine.model_values, str(engine.path)
    remedy = "pass the checkpoint that the engine's manifest names"
    why = None
    if (engine.draft_shape is None) != (config.drafter is None):
        why = f"only {'the checkpoint' if config.drafter is not None else 'the engine'} has a drafter"
    differ = [key for key in SIZES if found.get(key) != getattr(config, key)]
    if why is None and differ:
        why = "; ".join(f"{key} is {found.get(key)} there, {getattr(config, key)} here" for key in differ)
    if why is not None:
        raise MismatchError("the engine was not built from this checkpoint", where=reference, why=why, remedy=remedy)
    expected = read_json(reference / "config.json")
    both = [key for key in MEANINGS if key in found and key in expected and found[key] != expected[key]]
    return [
        Problem(f"{key} is {found[key]!r} in the engine, {expected[key]!r} in the checkpoint", where, None, remedy)
        for key in both
    ]


def check_weights(engine: EngineConfig, reference: Path) -> tuple[int | None, list[Problem]]:
    """Tensors of a torch engine compared with the checkpoint's, bit for bit; None if it stores no tensors."""
    if engine.backend != TORCH:
        return None, []
    return compare_checkpoints(engine.path / ENGINE_CHECKPOINT, reference, no_progress)


def not_seen(
    request: GateRequest, distributions: DistributionCheck | None, drafts: DraftCheck | None, refusal: str | None, *,
    has_drafter: bool,
) -> tuple[str, ...]:  # fmt: skip
    """What this run of the gate could not compare, and which faults may pass. `refusal`: why there are no logits."""
    found = []
    compiled = request.config.backend == TENSORRT
    if compiled:
        found.append("weights: they are compiled into the engine; a single wrong one shows only if its effect does")
    if distributions is None:
        why = "" if refusal is None else f" ({refusal})"
        found.append(f"logits: not shown{why}; faults that leave every largest logit in place pass")
    elif compiled:
        found.append("logits while drafts are verified: TensorRT-LLM shows those at the ends of prompts only")
    if has_drafter and drafts is None:
        found.append("drafter: this engine does not show its scores; faults that change few drafts pass")
    config = request.checkpoint.config
    epsilon = tensorrt_qk_epsilon(config) if compiled else None
    if epsilon is not None:
        found.append(
            f"epsilon of q and k norms: TensorRT-LLM 1.2 computes with {epsilon:g}, the model says "
            f"{config.norm_epsilon:g}; the reference follows TensorRT-LLM, the replay of the steps does not"
        )
    if compiled and config.quant_algo is not None:
        found.append(f"rounding of {config.quant_algo} activations: the reference computes in {config.dtype}")
    if Manifest.find(request.engine) is None:
        found.append("origin: the engine has no manifest.json, so nothing says which checkpoint it was built from")
    return tuple(found)
