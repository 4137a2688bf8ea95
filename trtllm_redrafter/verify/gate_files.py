"""The parity gate's checks that run nothing: config and weights; and what the gate could not check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_redrafter.backends.engine_config import TENSORRT, TORCH, EngineConfig
from trtllm_redrafter.checkpoint.config import read_checkpoint_config
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import ENGINE_CHECKPOINT
from trtllm_redrafter.errors import MismatchError, Problem
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.verify.gate_report import GateRequest
from trtllm_redrafter.verify.weights import compare_checkpoints

if TYPE_CHECKING:
    from trtllm_redrafter.verify.distributions import Distributions
    from trtllm_redrafter.verify.gate_drafter import Drafts

SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
"""If these differ, engine and checkpoint are of different models, and nothing else is compared."""

MEANINGS = (
    "dtype", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_size", "norm_epsilon",
    "hidden_act", "rotary_base", "rotary_scaling", "qwen_type", "attn_bias", "mlp_bias", "quantization",
    "redrafter_num_layers", "redrafter_hidden_size", "redrafter_exit_dim", "redrafter_is_rnn",
    "redrafter_greedy_search",
)  # fmt: skip
"""If these differ, the engine computes something else. Only fields in both files are compared."""


@dataclass(frozen=True)
class WeightsCheck:
    """`checked`: number of tensors; None if the engine does not store its weights as tensors."""

    checked: int | None
    problems: tuple[Problem, ...]


def check_pair(engine: EngineConfig, reference: Path) -> list[Problem]:
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


def check_weights(engine: EngineConfig, reference: Path) -> WeightsCheck:
    """Every tensor of a torch engine against the checkpoint's, bit for bit."""
    if engine.backend != TORCH:
        return WeightsCheck(None, ())
    count, problems = compare_checkpoints(engine.path / ENGINE_CHECKPOINT, reference, no_progress)
    return WeightsCheck(count, tuple(problems))


def not_seen(
    request: GateRequest, distributions: Distributions | None, drafts: Drafts | None, refusal: str | None, *,
    has_drafter: bool,
) -> tuple[str, ...]:  # fmt: skip
    """What this run of the gate could not compare, and which faults may pass. `refusal`: why there are no logits."""
    from trtllm_redrafter.verify.reference import tensorrt_qk_epsilon

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
    config = read_checkpoint_config(request.reference)
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
