"""Write a GGUF file's model as a Hugging Face directory: weights in bfloat16, configuration, tokenizer, chat template.

It undoes what llama.cpp did to the tensors (quantization; for LLaMA, the q/k row order for its rotary kernel) and
rebuilds the tokenizer from the GGUF's own tables. transformers can load a GGUF too, but not every tokenizer comes out
right (SmolLM2's: end-of-text becomes `<|im_start|>`, a second one is prepended to every prompt, digits are not split
and decoding drops spaces).

A quantizer may store the input embedding and the output matrix of a model that ties them at different precisions. Both
ends then get the output matrix, which is the more precise one: the published model has one matrix.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LAYER_TABLE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
TOP_TABLE = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Kinds of tokens in a GGUF that are no ordinary pieces of text."""

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert(gguf: Path, folder: Path) -> None:
    """Fill an empty directory."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    ends = end_tokens(fields)
    write_weights(reader, fields, folder / "model.safetensors")
    write_json(folder / "config.json", model_config(fields))
    generation = {"bos_token_id": _token(fields, "bos"), "eos_token_id": ends[0] if len(ends) == 1 else ends}
    write_json(folder / "generation_config.json", generation | {"pad_token_id": _token(fields, "padding")})
    write_tokenizer(fields, folder)


def write_weights(reader: Any, fields: dict[str, Any], path: Path) -> None:
    """Dequantize in float32, put rows back in order, round once to bfloat16."""
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    architecture = fields["general.architecture"]
    heads = {}
    if architecture == "llama":
        heads["attn_q"] = int(fields["llama.attention.head_count"])
        heads["attn_k"] = int(fields["llama.attention.head_count_kv"])

    def pieces(tensor: Any) -> Iterator[Any]:
        """Some thousand rows at a time: float32 takes four times the room of the file."""
        step = 16384 if tensor.data.ndim > 1 else len(tensor.data)
        for start in range(0, len(tensor.data), step):
            rows = dequantize(tensor.data[start : start + step], tensor.tensor_type)
            yield torch.from_numpy(rows.copy()).to(torch.bfloat16)

    def read(tensor: Any, name: str) -> tuple[str, Any]:
        weight = torch.cat(list(pieces(tensor)))
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        weight = rotary_halves(weight, heads[part]) if part in heads else weight
        return name, weight.contiguous()

    chosen = chosen_tensors(reader)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        state = dict(pool.map(lambda item: read(*item), chosen))
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors creates files for the owner alone


def chosen_tensors(reader: Any) -> list[tuple[Any, str]]:
    """Tensors to read and the names they get; of two matrices that the model ties, the output's."""
    names = {tensor.name for tensor in reader.tensors}
    chosen = []
    for tensor in reader.tensors:
        if tensor.name == EMBEDDING and OUTPUT in names:
            continue
        name = EMBEDDING if tensor.name == OUTPUT else tensor.name
        if name in TOP_TABLE:
            chosen.append((tensor, TOP_TABLE[name]))
        else:
            _, layer, part, kind = name.split(".")
            chosen.append((tensor, f"model.layers.{layer}.{LAYER_TABLE[part]}.{kind}"))
    return chosen


def rotary_halves(weight: Any, heads: int) -> Any:
    """llama.cpp interleaves the two halves that rotary embedding pairs; put them one after the other again."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def model_config(fields: dict[str, Any]) -> dict[str, Any]:
    architecture = fields["general.architecture"]

    def own(name: str) -> Any:
        return fields[f"{architecture}.{name}"]

    hidden, heads = int(own("embedding_length")), int(own("attention.head_count"))
    config = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "attention_dropout": 0.0,
        "bos_token_id": _token(fields, "bos"),
        "eos_token_id": _token(fields, "eos"),
        "pad_token_id": _token(fields, "padding"),
        "head_dim": int(fields.get(f"{architecture}.rope.dimension_count", hidden // heads)),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": int(own("feed_forward_length")),
        "max_position_embeddings": int(own("context_length")),
        "num_attention_heads": heads,
        "num_hidden_layers": int(own("block_count")),
        "num_key_value_heads": int(own("attention.head_count_kv")),
        # The file keeps a float32; the model's own value is the short decimal it came from.
        "rms_norm_eps": float(f"{own('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": float(own("rope.freq_base")),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }
    if architecture == "llama":
        config |= {"attention_bias": False, "mlp_bias": False, "initializer_range": 0.041666666666666664}
    else:
        # transformers 4.57.2 and later doubts the splitting of large vocabularies that do not name a version.
        config |= {"use_sliding_window": False, "sliding_window": None, "transformers_version": "4.44.0"}
    return config


def end_tokens(fields: dict[str, Any]) -> list[int]:
    """The end of a turn, and the end of text where that is another token (Qwen2 may write either)."""
    ends = [_token(fields, "eos")]
    if fields["general.architecture"] == "qwen2":
        ends += [t for t in (_token(fields, "padding"),) if t not in ends]
    return ends


def _token(fields: dict[str, Any], kind: str) -> int:
    return int(fields[f"tokenizer.ggml.{kind}_token_id"])


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE with the model's own splitting; the control tokens are special; nothing is added to a prompt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    used = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=used, merges=merges))
    set_splitting(tokenizer, fields["general.architecture"])
    tokenizer.decoder = decoders.ByteLevel()
    added = [(tokens[i], kind == CONTROL) for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, special in added if special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, special in added if not special])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = fields["tokenizer.chat_template"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        **special_tokens(fields, tokens),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields[f"{fields['general.architecture']}.context_length"]),
        "chat_template": template,
    }
    if fields["general.architecture"] == "qwen2":  # transformers' class for any tokenizer.json has token types too
        config["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", config)
    write_json(
        folder / "special_tokens_map.json",
        {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)},
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def special_tokens(fields: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    eos = tokens[_token(fields, "eos")]
    if fields["general.architecture"] == "qwen2":  # no beginning, nothing unknown; texts are padded with end-of-text
        return {"eos_token": eos, "pad_token": tokens[_token(fields, "padding")]}
    unknown = tokens[_token(fields, "unknown")]
    return {"bos_token": tokens[_token(fields, "bos")], "eos_token": eos, "pad_token": eos, "unk_token": unknown}


def set_splitting(tokenizer: Any, architecture: str) -> None:
    """What text is cut into before merging."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if architecture == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        split = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, rest])


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
