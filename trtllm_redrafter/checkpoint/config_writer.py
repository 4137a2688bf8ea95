"""Write a checkpoint's complete `config.json`, in the key order of NVIDIA's converters.

Every key for which TensorRT-LLM has a default is written, because some of its defaults are wrong for these models
(`hidden_act` gelu, `position_embedding_type` learned_absolute, Qwen's `attn_bias` true).
"""

from __future__ import annotations

from typing import Any

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.quantization import complete_excludes

QWEN_DEFAULT_SEQ_LENGTH = 8192
"""Written by TensorRT-LLM's own converter if the Hugging Face config has no `seq_length`."""


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
        "quantization": _quantization(config),
    }


def _quantization(config: CheckpointConfig) -> dict[str, Any]:
    section = {"quant_algo": None, "kv_cache_quant_algo": None} | dict(config.quantization)
    if config.quant_algo is not None and config.drafter is not None:
        section["exclude_modules"] = complete_excludes(section.get("exclude_modules"))
    return section


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
