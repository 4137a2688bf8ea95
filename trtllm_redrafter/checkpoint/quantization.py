"""Quantized checkpoints: which tensors each scheme adds to a linear layer, and which layers stay unquantized.

The tensors are those of NVIDIA's exporter (ModelOpt 0.47). Checkpoints with a scheme that is not in the table can still
be converted; only the shapes of their layers are not checked, which is reported.

    SCHEMES["FP8"].tensors(out=4096, inner=4096)
    # {"weight": F8_E4M3 [4096, 4096] , "weights_scaling_factor": F32 [1], "activation_scaling_factor": F32 [1]}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

MODEL_DTYPE = "model"
"""Placeholder for the checkpoint's own `dtype` in the tables below."""

DEFAULT_EXCLUDES = (
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)
"""Modules TensorRT-LLM leaves unquantized if there is no `exclude_modules`; a list given there *replaces* these."""

DRAFTER_EXCLUDE = "drafter*"
"""All modules of the drafter, `input_proj` included: its weights are never quantized."""


def complete_excludes(given: Collection[str] | None) -> list[str]:
    """The base model's own patterns, TensorRT-LLM's defaults, and the drafter, each once.

    NVIDIA's ReDrafter converter adds the drafter only if a list exists, and omits `input_proj`; a drafter layer that
    is not excluded is built as a quantized layer from 16-bit weights. A list without `lm_head` means that the base
    model's LM head *is* quantized and must remain so.
    """
    head_is_quantized = not is_excluded("lm_head", given)
    defaults = [p for p in DEFAULT_EXCLUDES if not (head_is_quantized and p == "*lm_head")]
    return list(dict.fromkeys([*(given or ()), *defaults, DRAFTER_EXCLUDE]))


def is_excluded(module: str, patterns: Collection[str] | None) -> bool:
    """TensorRT-LLM's rule: `fnmatchcase` of the full dotted path; the defaults apply if there is no list."""
    return any(fnmatchcase(module, p) for p in (DEFAULT_EXCLUDES if patterns is None else patterns))


@dataclass(frozen=True)
class QuantTensor:
    """One tensor of a quantized linear layer: its shape in terms of out, in and group size, and its split.

    `axes` names the dimensions: "out", "in", "group" (in / group_size) or "one". `out_packed` and `in_packed` say
    how many values are packed into one element. Dimensions "out" and "in"/"group" are split like the weight's.
    """

    dtype: str
    axes: tuple[str, ...]
    out_packed: int = 1
    in_packed: int = 1
    optional: bool = False

    def shape(self, out: int, inner: int, group_size: int) -> tuple[int, ...]:
        sizes = {
            "out": out // self.out_packed,
            "in": inner // self.in_packed,
            "group": inner // max(group_size, 1),
            "one": 1,
        }
        return tuple(sizes[axis] for axis in self.axes)


_SCALAR = QuantTensor("F32", ("one",))
_INT4 = QuantTensor("I8", ("out", "in"), out_packed=2)
_PREQUANT = QuantTensor(MODEL_DTYPE, ("in",))

SCHEMES: Mapping[str, Mapping[str, QuantTensor]] = {
    "FP8": {
        "weight": QuantTensor("F8_E4M3", ("out", "in")),
        "weights_scaling_factor": _SCALAR,
        "activation_scaling_factor": _SCALAR,
    },
    "FP8_PER_CHANNEL_PER_TOKEN": {
        "weight": QuantTensor("F8_E4M3", ("out", "in")),
        "per_channel_scale": QuantTensor("F32", ("out",)),
    },
    "W8A8_SQ_PER_CHANNEL": {
        "weight": QuantTensor("I8", ("out", "in")),
        "weights_scaling_factor": QuantTensor("F32", ("out",)),
        "activation_scaling_factor": _SCALAR,
        "prequant_scaling_factor": _PREQUANT,
    },
    "W4A16_AWQ": {
        "weight": _INT4,
        "weights_scaling_factor": QuantTensor("F32", ("out", "group")),
        "prequant_scaling_factor": QuantTensor(MODEL_DTYPE, ("in",), optional=True),
    },
    "W4A8_AWQ": {
        "weight": _INT4,
        "weights_scaling_factor": QuantTensor("F32", ("out", "group")),
        "weights_scaling_factor_2": _SCALAR,
        "activation_scaling_factor": _SCALAR,
        "prequant_scaling_factor": _PREQUANT,
    },
    "NVFP4": {
        "weight": QuantTensor("U8", ("out", "in"), in_packed=2),
        "weights_scaling_factor": QuantTensor("F8_E4M3", ("out", "group")),
        "weights_scaling_factor_2": QuantTensor("F32", ()),
        "activation_scaling_factor": QuantTensor("F32", ()),
    },
}
"""quant_algo → tensors of one linear layer."""

KV_CACHE_SCALES = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")
"""Scalars under `attention.` if the KV cache is quantized; TensorRT-LLM needs only the last one."""
