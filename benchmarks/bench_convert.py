"""How fast is a conversion, against `cp` of the same bytes, and how much memory does it take?

Makes synthetic LLaMA models (bfloat16, random bits), then alternates `cp` and `convert` (no cast, one rank) so that
both see the same machine. Two conditions: `cached` ends when the data is in the page cache, `durable` when it is on
the disk (`sync -f`). A conversion also hashes every input and output byte with SHA-256, which `cp` does not; the
hash alone, on one core, is measured beside them, because it is the floor of the cached condition.

    python benchmarks/bench_convert.py --sizes 1 4 --repeats 5 --output benchmarks/results/convert.json

The last line of stdout is the result as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.safetensors_io import new_header
from trtllm_redrafter.fsio import sha256_file, write_json

HIDDEN, INTERMEDIATE, HEADS, VOCAB = 2048, 5632, 16, 32000
BYTES = 2
LAYER_BYTES = BYTES * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)
FIXED_BYTES = BYTES * (2 * VOCAB * HIDDEN + HIDDEN)

CHILD = """
import json, sys, time
from pathlib import Path
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.conversion.options import ConvertOptions
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.progress import no_progress
def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
Path("/proc/self/clear_refs").write_text("5")  # the peak restarts here, after the imports
bare = memory("VmRSS")
options = ConvertOptions(base=Path(sys.argv[1]), drafter=None, output=Path(sys.argv[2]), dtype="auto", tp_size=1,
                         num_beams=None, draft_len=None, greedy=True, parallel_embedding=False, workers=1,
                         overwrite=False)
start = time.perf_counter()
convert(plan_conversion(options), no_progress)
seconds = time.perf_counter() - start
peak = memory("VmHWM")
print(json.dumps({"seconds": seconds, "bare_rss_kb": bare, "peak_rss_kb": peak}))
"""


def write_model(path: Path, gigabytes: float) -> int:
    """A model directory of about this size, in one file or in shards of 2 GB; returns its weight bytes."""
    path.mkdir()
    layers = max(1, round((gigabytes * 1e9 - FIXED_BYTES) / LAYER_BYTES))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "num_hidden_layers": layers, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    write_json(path / "config.json", config)
    groups = _shards(model_shapes(layers), 2e9)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {t: name for name, group in zip(names, groups, strict=True) for t in group}
        write_json(path / "model.safetensors.index.json", {"weight_map": weight_map})
    return sum(_write_random(path / name, group) for name, group in zip(names, groups, strict=True))


def model_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of a LLaMA."""
    h, i = HIDDEN, INTERMEDIATE
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, h)}
    for layer in range(layers):
        p = f"model.layers.{layer}."
        shapes |= {f"{p}self_attn.{x}_proj.weight": (h, h) for x in "qkvo"}
        shapes |= {p + "mlp.gate_proj.weight": (i, h), p + "mlp.up_proj.weight": (i, h)}
        shapes |= {p + "mlp.down_proj.weight": (h, i)}
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
    return shapes | {"model.norm.weight": (h,), "lm_head.weight": (VOCAB, h)}


def _shards(shapes: dict[str, tuple[int, ...]], limit: float) -> list[dict[str, tuple[int, ...]]]:
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = BYTES * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if groups[-1] and size + nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    return groups


def _write_random(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    header, _ = new_header((name, "BF16", shape) for name, shape in shapes.items())
    size = sum(BYTES * math.prod(shape) for shape in shapes.values())
    block = os.urandom(2**24)
    with path.open("wb") as file:
        file.write(header)
        left = size
        while left:
            left -= file.write(block[: min(left, len(block))])
    return len(header) + size


def timed(action: Callable[[], Any], directory: Path, durable: bool) -> float:
    start = time.perf_counter()
    action()
    if durable:
        subprocess.run(["sync", "-f", str(directory)], check=True)
    return time.perf_counter() - start


def copy_once(model: Path, work: Path, durable: bool) -> float:
    target = work / "copy"
    seconds = timed(lambda: subprocess.run(["cp", "-r", str(model), str(target)], check=True), work, durable)
    shutil.rmtree(target)
    return seconds


def convert_once(model: Path, work: Path, durable: bool) -> dict[str, float]:
    """Seconds from plan to rename inside a fresh process (without its imports), and its memory."""
    target = work / "checkpoint"
    command = [sys.executable, "-c", CHILD, str(model), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if durable:
        result["seconds"] += timed(lambda: None, work, durable=True)
    shutil.rmtree(target)
    return result


def measure(gigabytes: float, repeats: int, work: Path) -> dict[str, Any]:
    model = work / "model"
    size = write_model(model, gigabytes)
    subprocess.run(["sync", "-f", str(work)], check=True)
    result: dict[str, Any] = {"weight_bytes": size, "conditions": {}}
    rss = []
    for condition in ("cached", "durable"):
        durable = condition == "durable"
        copy_once(model, work, durable)  # warm up
        pairs = [(copy_once(model, work, durable), convert_once(model, work, durable)) for _ in range(repeats)]
        rss += [(c["peak_rss_kb"] - c["bare_rss_kb"]) / 1024 for _, c in pairs]
        copies, conversions = [p[0] for p in pairs], [p[1]["seconds"] for p in pairs]
        result["conditions"][condition] = {
            "cp_seconds": [round(s, 3) for s in copies],
            "convert_seconds": [round(s, 3) for s in conversions],
            "cp_gb_per_s": round(size / statistics.median(copies) / 1e9, 3),
            "convert_gb_per_s": round(size / statistics.median(conversions) / 1e9, 3),
            "convert_to_cp_ratio": round(statistics.median(copies) / statistics.median(conversions), 3),
        }
    start = time.perf_counter()
    for file in model.glob("*.safetensors"):
        sha256_file(file)
    result["sha256_gb_per_s_one_core"] = round(size / (time.perf_counter() - start) / 1e9, 3)
    result["peak_rss_over_imports_mb"] = round(max(rss), 1)
    shutil.rmtree(model)
    return result


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0, 4.0], help="gigabytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=None, help="where to work (default: the system's)")
    parser.add_argument("--output", type=Path, default=None, help="write the result here too")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "convert", "machine": machine(), "sizes_gb": {}}
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=arguments.directory) as directory:
        for gigabytes in arguments.sizes:
            result["sizes_gb"][f"{gigabytes:g}"] = measure(gigabytes, arguments.repeats, Path(directory))
            print(f"{gigabytes:g} GB: {json.dumps(result['sizes_gb'][f'{gigabytes:g}'])}", file=sys.stderr)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
