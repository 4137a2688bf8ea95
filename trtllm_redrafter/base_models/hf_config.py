"""Parse a Hugging Face config.json, of transformers 4 or 5, into the checkpoint's config.

transformers 5 renamed `torch_dtype` to `dtype` and moved `rope_theta` and `rope_scaling` into `rope_parameters`; some
files have both. `one_form` takes a field that is missing in one place from the other, and two values that disagree are
refused, since versions of transformers differ in which of them they use. Settings that TensorRT-LLM would compute
differently are refused by name, instead of changing the generated text later.

    parsed = parse_hf_config(read_json(path / "config.json"), where=path / "config.json")
    parsed.config.rotary_base, parsed.notes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.config import DTYPES, QWEN_DEFAULT_SEQ_LENGTH, CheckpointConfig
from trtllm_redrafter.checkpoint.families import FAMILIES, Family, family_of_type
from trtllm_redrafter.checkpoint.fields import FieldReader
from trtllm_redrafter.checkpoint.kinds import Kind, kind_of
from trtllm_redrafter.errors import InputError, Problem, raise_together
from trtllm_redrafter.fsio import read_json

ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Rotary scalings that are converted, with the fields each needs."""

DEFAULT_EPSILON = 1e-6
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_WINDOW_LAYERS = 28
"""transformers' defaults, for files that leave them out; the last one is Qwen's `max_window_layers`."""

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ParsedConfig:
    """`config` is None only if there are `problems`."""

    config: CheckpointConfig | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()


def parse_hf_config(raw: Mapping[str, Any], *, where: Path) -> ParsedConfig:
    """The config for one rank, in the model's own dtype (float32 if the file names none)."""
    merged, contradictions = one_form(raw, where=where)
    fields = FieldReader(merged, where)
    fields.problems += contradictions
    if kind_of(raw) is Kind.DRAFTER:
        fields.problem("this is a drafter, not a base model", remedy="pass it to --drafter, and the base to --base")
        return ParsedConfig(None, tuple(fields.problems))
    family = find_family(merged)
    if family is None:
        named = _architecture(merged)
        fields.problem(
            f"the architecture {named!r} is not supported"
            if named
            else f"no architecture, and the model_type {merged.get('model_type')!r} is not supported",
            why=f"supported are {', '.join(FAMILIES)}",
            remedy="use a base model of one of these architectures",
        )
        return ParsedConfig(None, tuple(fields.problems))
    other = family_of_type(merged.get("model_type")) or family
    if other is not family:
        what = f"architectures names {family.architecture}, model_type is {other.model_type!r}"
        fields.problem(what, why="transformers goes by model_type, TensorRT-LLM by architectures", remedy="correct one")
    notes: list[str] = []
    config = _config(fields, family, notes)
    _refusals(fields)
    return ParsedConfig(None if fields.problems else config, tuple(fields.problems), tuple(notes))


def read_base_config(file: Path) -> tuple[CheckpointConfig, tuple[str, ...]]:
    """The config of a base model, Hugging Face's or a checkpoint's, from its config.json alone; and notes."""
    raw = read_json(file)
    if kind_of(raw) is Kind.CHECKPOINT:
        return CheckpointConfig.from_dict(raw, where=file), ()
    parsed = parse_hf_config(raw, where=file)
    raise_together(InputError, parsed.problems, "the base model cannot be converted", where=file.parent)
    assert parsed.config is not None
    return parsed.config, parsed.notes


def find_family(fields: Mapping[str, Any]) -> Family | None:
    """The family of a config's `architectures`, or of its `model_type` if that is null, empty or missing."""
    named = _architecture(fields)
    if not named:
        return family_of_type(fields.get("model_type"))
    return FAMILIES.get(named) if isinstance(named, str) else None


def _architecture(fields: Mapping[str, Any]) -> Any:
    names = fields.get("architectures")
    return names[0] if isinstance(names, list) and len(names) == 1 else names


def _config(fields: FieldReader, family: Family, notes: list[str]) -> CheckpointConfig:
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if fields.values.get("head_dim") is None and family.default_head_dim is None and hidden % heads:
        fields.problem(f"hidden_size {hidden} is not a multiple of {heads} heads", remedy="set head_dim")
    theta, scaling = _rope(fields)
    return CheckpointConfig(
        architecture=family.architecture,
        base_architecture=family.architecture,
        dtype=stated_dtype(fields.values) or "float32",
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=fields.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.size("num_key_value_heads", heads),
        head_size=fields.size("head_dim", family.default_head_dim or hidden // heads),
        vocab_size=fields.size("vocab_size"),
        norm_epsilon=fields.number("rms_norm_eps", DEFAULT_EPSILON),
        hidden_act=fields.text("hidden_act", "silu"),
        max_position_embeddings=_positions(fields, family, notes),
        rotary_base=theta,
        rotary_scaling=scaling,
        attn_bias=_bias(fields, family.attn_bias),
        mlp_bias=_bias(fields, family.mlp_bias),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        sliding_window=None,
        tp_size=1,
        pp_size=1,
        use_parallel_embedding=False,
        embedding_sharding_dim=0,
        quantization={},
        drafter=None,
        draft_shape=None,
        greedy=True,
        extra={"seq_length": fields.size("seq_length", QWEN_DEFAULT_SEQ_LENGTH)}
        if family.model_class == "qwen"
        else {},
    )


def stated_dtype(raw: Mapping[str, Any]) -> str | None:
    """The file's dtype (`dtype` in transformers 5, `torch_dtype` in 4) if it is supported, else None."""
    name = one_form(raw, where=Path("config.json"))[0].get("dtype")
    return name if name in DTYPES else None


def _bias(fields: FieldReader, rule: str | bool) -> bool:
    return rule if isinstance(rule, bool) else fields.flag(rule, False)


def _rope(fields: FieldReader) -> tuple[float, dict[str, Any] | None]:
    """rotary_base, and rotary_scaling as the checkpoint stores it (or None)."""
    theta = fields.number("rope_theta", DEFAULT_ROPE_THETA)
    scaling = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")  # the first: not one form
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KEYS or any(isinstance(value, dict) for value in scaling.values()):
        fields.problem(
            f"rotary scaling {kind!r} is not supported",
            why=f"converted are {', '.join(ROPE_KEYS)}; another rule would rotate positions differently at run time",
            remedy="remove it from config.json to convert the model for its unscaled context, if it has one",
        )
        return theta, None
    inner = FieldReader(scaling, f"{fields.where}, rotary scaling {kind}")
    for key in ROPE_KEYS[kind]:
        inner.number(key)
    fields.problems += inner.problems
    return theta, None if kind == "default" else dict(scaling)


def _positions(fields: FieldReader, family: Family, notes: list[str]) -> int:
    """max_position_embeddings, limited to the sliding window if there is one.

    TensorRT-LLM's ReDrafter engines have one KV pool without a window: beyond it, they would attend to tokens that the
    model was not trained to attend to. Up to the window both compute the same.
    """
    positions = fields.size("max_position_embeddings")
    window = _window(fields, family)
    if window is None or window >= positions:
        return positions
    notes.append(
        f"max_position_embeddings is cut from {positions} to the sliding window, {window}: "
        "up to there full attention is exact, beyond it the engine would attend to more than the model was trained on"
    )
    return window


def _window(fields: FieldReader, family: Family) -> int | None:
    """The sliding window of the layers that have one; None if all layers use full attention.

    `layer_types`, which later versions of transformers write in addition to the older switches, must agree with them.
    """
    layers, window = fields.size("num_hidden_layers"), fields.optional_size("sliding_window")
    if "sliding_window" not in fields.values:
        window = family.default_sliding_window
    said = f"sliding_window {window}"
    if family.has_window_switch:
        uses = fields.flag("use_sliding_window", False)
        first = fields.size("max_window_layers", DEFAULT_WINDOW_LAYERS, minimum=0)
        said += f", use_sliding_window {str(uses).lower()}, max_window_layers {first}"
        window = window if uses and first < layers else None
    types = fields.values.get("layer_types")
    if types is None:
        return window
    if not isinstance(types, list) or len(types) != layers or any(kind not in LAYER_TYPES for kind in types):
        fields.problem("layer_types is not usable", why=f"{layers} of {', '.join(LAYER_TYPES)} are needed")
    elif ("sliding_attention" in types) != (window is not None):
        listed = "some" if window is None else "no"
        what = f"layer_types lists {listed} sliding_attention, but the file has {said}"
        fields.problem(what, why="both say which layers have a window", remedy="correct the one that is wrong")
    return window


def _refusals(fields: FieldReader) -> None:
    """Report settings for which TensorRT-LLM's graph would not compute the model's function."""
    raw = fields.values
    if raw.get("hidden_act", "silu") != "silu":
        what = f"hidden_act is {raw['hidden_act']!r}"
        fields.problem(what, why="the gated MLP of these families uses silu", remedy="use the original model")
    factor = raw.get("partial_rotary_factor")
    if factor not in (None, 1.0):
        fields.problem(f"partial_rotary_factor is {factor}", why="heads are rotated as a whole")
    if raw.get("quantization_config"):
        method = fields.mapping("quantization_config").get("quant_method", "unknown")
        fields.problem(
            f"the model is quantized in Hugging Face's format ({method})",
            why="its weights are stored under other names and scales than TensorRT-LLM's",
            remedy="convert the original model, or pass a TensorRT-LLM checkpoint of NVIDIA's quantizer as --base",
        )
    named = raw.get("dtype")
    if named is not None and named not in DTYPES:
        fields.problem(f"the dtype {named!r} is not supported", why=f"one of {', '.join(DTYPES)} is needed")


_WHY = "the two are one setting under two names, and versions of transformers differ in which one they read"
_TOP = "top-level"
_MODERN, _LEGACY = "rope_parameters", "rope_scaling"
_MOVED = ("partial_rotary_factor",)
"""Other top-level fields of transformers 4, besides `rope_theta`, that transformers 5 has in `rope_parameters`."""
_KIND = ("rope_type", "type")


class _Merge:
    """Takes one value from several places, and records a problem where values disagree."""

    def __init__(self, where: Path) -> None:
        self._where = str(where)
        self.problems: list[Problem] = []

    def one(self, name: str, places: Mapping[str, Any]) -> Any:
        """The first non-null value, in the order of `places`."""
        stated = [(place, value) for place, value in places.items() if value is not None]
        if not stated:
            return None
        first_place, first = stated[0]
        for place, value in stated[1:]:
            if value != first:
                what = f"{name} is {first!r} ({first_place}) and {value!r} ({place})"
                remedy = "correct the file: keep the value the model was trained with"
                self.problems.append(Problem(what, self._where, _WHY, remedy))
                break
        return first


def one_form(raw: Mapping[str, Any], *, where: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The fields in transformers 4's places (except `dtype`), and all contradictions.

    `dtype` has no `torch.` prefix; `rope_theta` and `partial_rotary_factor` are at the top level, the other rotary
    settings in `rope_scaling`. Rotary settings that are no object, or differ by kind of layer, are left unchanged.
    """
    fields, merge = dict(raw), _Merge(where)
    dtype = merge.one("dtype", {key: _dtype_name(fields.pop(key, None)) for key in ("dtype", "torch_dtype")})
    if dtype is not None:
        fields["dtype"] = dtype
    modern, legacy = raw.get(_MODERN), raw.get(_LEGACY)
    if all(value is None or _is_flat(value) for value in (modern, legacy)):
        _merge_rope(fields, modern or {}, legacy or {}, merge)
    return fields, merge.problems


def _dtype_name(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(inner, dict) for inner in value.values())


def _merge_rope(fields: dict[str, Any], modern: Mapping[str, Any], legacy: Mapping[str, Any], merge: _Merge) -> None:
    fields.pop(_MODERN, None)
    inside = {_MODERN: modern, _LEGACY: legacy}
    for key in ("rope_theta", *_MOVED):
        value = merge.one(key, {_TOP: fields.get(key)} | {name: part.get(key) for name, part in inside.items()})
        if value is not None:
            fields[key] = value
    kind = merge.one(
        "the rotary scaling", {f"{name}.{key}": part.get(key) for name, part in inside.items() for key in _KIND}
    )
    keys = dict.fromkeys(k for part in inside.values() for k in part if k not in ("rope_theta", *_MOVED))
    scaling = {
        k: kind if k in _KIND else merge.one(k, {name: part.get(k) for name, part in inside.items()}) for k in keys
    }
    original = "original_max_position_embeddings"
    if kind == "llama3":
        value = merge.one(original, {_TOP: fields.get(original), "rotary scaling": scaling.get(original)})
        scaling = scaling if value is None else scaling | {original: value}
    fields[_LEGACY] = {key: value for key, value in scaling.items() if value is not None} or None
