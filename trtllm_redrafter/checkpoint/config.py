"""`config.json` of a TensorRT-LLM checkpoint, as one frozen dataclass, and written from it.

Accepts the files of TensorRT-LLM's own converters, of ModelOpt's fallback writer (which leaves out `qwen_type`,
`attn_bias`, `tie_word_embeddings`) and our own; unknown keys are kept and written back. Whatever a reader would
otherwise have to guess (bias? q/k norm? head size?) is an attribute here:

    config = read_checkpoint_config(Path("checkpoint"))        # config.json alone: no weights, no torch
    config.head_size, config.attn_bias, config.drafter, config.draft_shape

`config_dict` writes the keys in the order of NVIDIA's converters, and also every key for which TensorRT-LLM has a
default, because some of its defaults are wrong for these models (`hidden_act` gelu, `position_embedding_type`
learned_absolute, Qwen's `attn_bias` true).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.families import FAMILIES, REDRAFTER_ARCHITECTURES
from trtllm_redrafter.checkpoint.fields import MAX_SIZE, FieldReader
from trtllm_redrafter.checkpoint.kinds import Kind, kind_of, wrong_kind
from trtllm_redrafter.checkpoint.quantization import complete_excludes
from trtllm_redrafter.errors import InputError, Problem, brief, raise_together
from trtllm_redrafter.fsio import read_json
from trtllm_redrafter.redrafter.config import DrafterConfig, DraftShape

DTYPES = ("float16", "bfloat16", "float32")

MAX_RANKS = 1024

QWEN_DEFAULT_SEQ_LENGTH = 8192
"""Written by TensorRT-LLM's own converter if the Hugging Face config has no `seq_length`."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Every field of the checkpoint format this package uses, resolved.

    `vocab_size` is the base model's own, without padding. `rotary_scaling` is Hugging Face's dict (`rope_type`,
    `factor`, ...) or None. `quantization` is the file's section, unchanged. `extra` has all other keys.
    """

    architecture: str
    base_architecture: str
    dtype: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    vocab_size: int
    norm_epsilon: float
    hidden_act: str
    max_position_embeddings: int
    rotary_base: float
    rotary_scaling: Mapping[str, Any] | None
    attn_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    sliding_window: int | None
    tp_size: int
    pp_size: int
    use_parallel_embedding: bool
    embedding_sharding_dim: int
    quantization: Mapping[str, Any]
    drafter: DrafterConfig | None
    draft_shape: DraftShape | None
    greedy: bool
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """`llama` or `qwen`: which of TensorRT-LLM's two model classes loads it."""
        return FAMILIES[self.base_architecture].model_class

    @property
    def qwen_type(self) -> str | None:
        return FAMILIES[self.base_architecture].qwen_type

    @property
    def has_qk_norm(self) -> bool:
        """RMSNorm over each head of q and k, before RoPE."""
        return FAMILIES[self.base_architecture].qk_norm

    @property
    def dense_bias(self) -> bool:
        """Does `attention.dense` have a bias? LLaMA's `attn_bias` includes it, Qwen's does not."""
        return self.attn_bias and self.family == "llama"

    @property
    def quant_algo(self) -> str | None:
        return self.quantization.get("quant_algo")

    @property
    def kv_cache_quant_algo(self) -> str | None:
        return self.quantization.get("kv_cache_quant_algo")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the LM head over all ranks: V rounded up to a multiple of tp_size."""
        return -(-self.vocab_size // self.tp_size) * self.tp_size

    @property
    def parameters_hint(self) -> str:
        """One line of text: `LlamaForCausalLM, 32 layers, hidden 4096, 32/8 heads of 128, vocabulary 128256`."""
        return (
            f"{self.base_architecture}, {self.num_hidden_layers} layers, hidden {self.hidden_size}, "
            f"{self.num_attention_heads}/{self.num_key_value_heads} heads of {self.head_size}, "
            f"vocabulary {self.vocab_size}"
        )

    def with_drafter(self, drafter: DrafterConfig, shape: DraftShape, *, greedy: bool) -> CheckpointConfig:
        """The config of this base model's checkpoint with a drafter, which is never quantized."""
        architecture, quantization = FAMILIES[self.base_architecture].redrafter, dict(self.quantization)
        if self.quant_algo is not None:
            quantization["exclude_modules"] = complete_excludes(quantization.get("exclude_modules"))
        return replace(
            self, architecture=architecture, quantization=quantization, drafter=drafter, draft_shape=shape,
            greedy=greedy,
        )  # fmt: skip

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, where: str | Path, tensor_names: Collection[str] | None = None
    ) -> CheckpointConfig:
        """Parse a `config.json`; all problems are reported in one `InputError`.

        `tensor_names` decide what an incomplete file leaves open (`attn_bias`, `mlp_bias`).
        """
        fields = FieldReader(values, where)
        base_architecture = _base_architecture(fields)
        raise_together(InputError, fields.problems, "the checkpoint's config.json is not usable", where=where)
        config = _read(fields, base_architecture, tensor_names)
        raise_together(InputError, fields.problems, "the checkpoint's config.json is not usable", where=where)
        return config


def _base_architecture(fields: FieldReader) -> str:
    """The base architecture of the file's `architecture`, distinguishing Qwen's generations."""
    name = fields.text("architecture")
    if name in REDRAFTER_ARCHITECTURES:
        name = fields.text("base_model_architecture", REDRAFTER_ARCHITECTURES[name])
    qwen_type = str(fields.values.get("qwen_type"))
    by_type = {f.qwen_type: architecture for architecture, f in FAMILIES.items() if f.qwen_type is not None}
    if name in ("QWenForCausalLM", *by_type.values()) and qwen_type in by_type:
        name = by_type[qwen_type]
    if name not in FAMILIES:
        fields.problem(
            f"the architecture {name!r} is not supported",
            why=f"known are {', '.join([*FAMILIES, *REDRAFTER_ARCHITECTURES])}",
            remedy="use a checkpoint of a supported model"
            + ("; convert this one again, its class was removed from TensorRT-LLM" if "ReDrafter" in name else ""),
        )
    return name


def _read(fields: FieldReader, base: str, tensor_names: Collection[str] | None) -> CheckpointConfig:
    def found(suffix: str, default: bool) -> bool:
        return default if tensor_names is None else any(n.endswith(suffix) for n in tensor_names)

    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    mapping = fields.mapping("mapping")
    rope = fields.values.get("rotary_scaling")
    is_redrafter = fields.text("architecture") in REDRAFTER_ARCHITECTURES
    vocab = fields.size("vocab_size")
    drafter, shape = _read_drafter(fields, hidden, vocab) if is_redrafter else (None, None)
    return CheckpointConfig(
        architecture=fields.text("architecture"),
        base_architecture=base,
        dtype=fields.choice("dtype", DTYPES),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size", 4 * hidden),
        num_hidden_layers=fields.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.size("num_key_value_heads", heads),
        head_size=fields.size("head_size", hidden // max(heads, 1)),
        vocab_size=vocab,
        norm_epsilon=fields.number("norm_epsilon", 1e-5),
        hidden_act=fields.text("hidden_act", "silu"),
        max_position_embeddings=fields.size("max_position_embeddings"),
        rotary_base=fields.number("rotary_base", 10000.0),
        rotary_scaling=None if rope is None else fields.mapping("rotary_scaling"),
        attn_bias=fields.flag("attn_bias", found("attention.qkv.bias", FAMILIES[base].attn_bias is True)),
        mlp_bias=fields.flag("mlp_bias", found("mlp.fc.bias", False)),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        sliding_window=fields.optional_size("sliding_window"),
        tp_size=_rank_count(mapping, "tp_size", fields),
        pp_size=_rank_count(mapping, "pp_size", fields),
        use_parallel_embedding=fields.flag("use_parallel_embedding", False),
        embedding_sharding_dim=1 if fields.values.get("embedding_sharding_dim") == 1 else 0,
        quantization=_quantization(fields),
        drafter=drafter,
        draft_shape=shape,
        greedy=fields.flag("redrafter_greedy_search", True),
        extra={k: v for k, v in fields.values.items() if k not in fields.read},
    )


def _read_drafter(fields: FieldReader, hidden: int, vocab: int) -> tuple[DrafterConfig, DraftShape]:
    drafter_hidden = fields.size("redrafter_hidden_size")
    if drafter_hidden != hidden:
        fields.problems.append(
            Problem(f"redrafter_hidden_size is {drafter_hidden}, hidden_size is {hidden}", str(fields.where))
        )
    drafter = DrafterConfig(
        vocab_size=vocab,
        hidden_size=drafter_hidden,
        exit_dim=fields.size("redrafter_exit_dim"),
        num_layers=fields.size("redrafter_num_layers", minimum=0),
        rnn=fields.flag("redrafter_is_rnn", None),
    )
    return drafter, read_draft_shape(fields)


def read_draft_shape(fields: FieldReader) -> DraftShape:
    """The draft shape in a checkpoint's config, or in an engine's copy of it."""
    shape = DraftShape(fields.size("redrafter_num_beams"), fields.size("redrafter_draft_len_per_beam"))
    fields.problems += [replace(problem, where=str(fields.where)) for problem in shape.problems()]
    return shape


def _quantization(fields: FieldReader) -> dict[str, Any]:
    """The section unchanged; what this package asks it for has the types that TensorRT-LLM writes."""
    section = fields.mapping("quantization")
    needed: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "quant_algo": ("a name or null", lambda v: isinstance(v, str)),
        "kv_cache_quant_algo": ("a name or null", lambda v: isinstance(v, str)),
        "group_size": ("a whole number", lambda v: type(v) is int and 0 <= v <= MAX_SIZE),
        "exclude_modules": ("a list of names", lambda v: isinstance(v, list) and all(isinstance(p, str) for p in v)),
    }
    for key, (what, fits) in needed.items():
        value = section.get(key)
        if value is not None and not fits(value):
            fields.problem(f"quantization.{key} is {brief(value)}", remedy=f"it must be {what}")
    return section


def _rank_count(mapping: Mapping[str, Any], key: str, fields: FieldReader) -> int:
    value = mapping.get(key, 1)
    if type(value) is not int or not 1 <= value <= MAX_RANKS:
        remedy = f"it must be a whole number from 1 to {MAX_RANKS}"
        fields.problem(f"mapping.{key} is {brief(value)}", remedy=remedy)
        return 1
    return value


def read_raw_config(path: Path) -> dict[str, Any]:
    """The config JSON of a checkpoint directory; `InputError` if it is missing or of something else."""
    if not path.is_dir():
        raise InputError("the checkpoint directory does not exist", where=path, remedy="check the path")
    raw = read_json(path / "config.json")
    if kind_of(raw) is not Kind.CHECKPOINT:
        raise wrong_kind(path, raw, Kind.CHECKPOINT)
    return raw


def read_checkpoint_config(path: Path) -> CheckpointConfig:
    """The parsed config of a checkpoint directory."""
    return CheckpointConfig.from_dict(read_raw_config(path), where=path / "config.json")


def config_dict(config: CheckpointConfig) -> dict[str, Any]:
    """All keys of `config`; the `extra` keys follow unchanged."""
    written = _base_keys(config)
    if config.family == "qwen":
        written |= {
            "qwen_type": config.qwen_type,
            "seq_length": config.extra.get("seq_length", QWEN_DEFAULT_SEQ_LENGTH),
            "moe_intermediate_size": 0,
            "moe_shared_expert_intermediate_size": 0,
        }
    if config.sliding_window is not None:
        written["sliding_window"] = config.sliding_window
    written |= _drafter_keys(config)
    return written | {key: value for key, value in config.extra.items() if key not in written}


def _base_keys(config: CheckpointConfig) -> dict[str, Any]:
    return {
        "architecture": config.architecture,
        "dtype": config.dtype,
        "logits_dtype": config.extra.get("logits_dtype", "float32"),
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_size": config.hidden_size,
        "head_size": config.head_size,
        "intermediate_size": config.intermediate_size,
        "norm_epsilon": config.norm_epsilon,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": config.rotary_base,
        "rotary_scaling": None if config.rotary_scaling is None else dict(config.rotary_scaling),
        "attn_bias": config.attn_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_parallel_embedding": config.use_parallel_embedding,
        "embedding_sharding_dim": config.embedding_sharding_dim,
        "mapping": {
            "world_size": config.tp_size * config.pp_size,
            "tp_size": config.tp_size,
            "pp_size": config.pp_size,
        },
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None} | dict(config.quantization),
    }


def _drafter_keys(config: CheckpointConfig) -> dict[str, Any]:
    if config.drafter is None or config.draft_shape is None:
        return {}
    return {
        "base_model_architecture": config.base_architecture,
        "redrafter_num_layers": config.drafter.num_layers,
        "redrafter_hidden_size": config.drafter.hidden_size,
        "redrafter_exit_dim": config.drafter.exit_dim,
        "redrafter_is_rnn": config.drafter.rnn,
        "redrafter_num_beams": config.draft_shape.num_beams,
        "redrafter_draft_len_per_beam": config.draft_shape.draft_len,
        "redrafter_greedy_search": config.greedy,
    }
