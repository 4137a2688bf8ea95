"""A `trtllm-build` that takes the documented flags, changes values as the real builder does, and writes engine files.

`STANDIN_BUILD` chooses how it ends: ok, oom, kernel, exit, killed, missing-rank, sleep,
surprise (a value nobody foresaw).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

VERSION = "1.2.1"
MODE = 16


def parser(contract: dict[str, Any]) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("trtllm-build", allow_abbrev=False)
    for flag, spec in contract.items():
        if not flag.startswith("--"):
            continue
        if spec["type"].startswith("switch"):
            found.add_argument(flag, action="store_true")
        else:
            kind = int if spec["type"] == "int" else str
            found.add_argument(flag, type=kind, choices=spec["choices"], default=spec["default"])
    return found


def build_config(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """What the builder makes of the values it was given."""
    drafted = config.get("redrafter_num_beams", 0) * config.get("redrafter_draft_len_per_beam", 0)
    if args.gather_context_logits and args.max_draft_len > 0:  # 0 on ReDrafter's command line: not noticed there
        raise RuntimeError("gather_context_logits is not supported with draft tokens")
    block = args.tokens_per_block or 32
    tokens = max(min(args.max_num_tokens, args.max_batch_size * args.max_seq_len), block)
    tuned = min(args.opt_num_tokens or args.max_batch_size * args.max_beam_width, tokens)
    if drafted:
        tokens = max(tokens, args.max_batch_size * (drafted + 1))
    paged, fp8 = context_attention(args, config.get("quantization") or {})
    return {
        "max_batch_size": args.max_batch_size,
        "max_input_len": args.max_input_len,
        "max_seq_len": args.max_seq_len + drafted,
        "max_beam_width": args.max_beam_width,
        "max_num_tokens": tokens,
        "opt_num_tokens": tuned,
        "max_draft_len": drafted,
        "speculative_decoding_mode": MODE if drafted else 1,
        "kv_cache_type": args.kv_cache_type.upper(),
        "plugin_config": {
            "gemm_plugin": args.gemm_plugin,
            "remove_input_padding": args.remove_input_padding == "enable",
            "use_paged_context_fmha": paged,
            "use_fp8_context_fmha": fp8,
            **fusions(args, config),
        },
    }


def fusions(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, bool]:
    """Reductions are fused for three classes over several ranks, quantization into norms for LLaMA in NVFP4."""
    reduce, buffer, norm = (
        getattr(args, name) == "enable" for name in ("reduce_fusion", "user_buffer", "norm_quant_fusion")
    )
    architecture, tp_size = config.get("architecture"), config.get("mapping", {}).get("tp_size", 1)
    if reduce and (tp_size == 1 or architecture not in ("LlamaForCausalLM", "Gemma2ForCausalLM", "MedusaForCausalLM")):
        reduce = False
    if buffer and not reduce:
        buffer = False
    fp4 = (config.get("quantization") or {}).get("quant_algo") == "NVFP4"
    if norm and (reduce or architecture != "LlamaForCausalLM" or not fp4):
        norm = False
    return {"reduce_fusion": reduce, "user_buffer": buffer, "norm_quant_fusion": norm}


def context_attention(args: argparse.Namespace, quantization: dict[str, Any]) -> tuple[bool, bool]:
    """The builder's branches in its order, for compute capability 8.9 and up."""
    paged, fp8 = args.use_paged_context_fmha == "enable", args.use_fp8_context_fmha == "enable"
    cache = quantization.get("kv_cache_quant_algo")
    if args.context_fmha == "disable":
        paged = fp8 = False
    elif quantization.get("quant_algo") not in ("FP8", "W4A8_AWQ", "NVFP4"):
        fp8 = False
        if paged and cache == "FP8":
            paged = False
    elif paged:
        if cache != "FP8" and fp8:
            fp8 = False
        elif cache == "FP8" and not fp8:
            fp8 = True
    if paged and cache == "INT8":
        paged = False
    return paged, fp8


def say(text: str) -> None:
    print(f"[11/23/2026-10:00:00] [TRT-LLM] {text}", flush=True)


def fail(how: str) -> None:
    if how == "oom":
        say("[W] Requested amount of GPU memory (24793579520 bytes) could not be allocated.")
        print("[TRT] [E] [virtualMemoryBuffer.cpp] Error Code 2: OutOfMemory (no further information)", flush=True)
    elif how == "kernel":
        say("[E] No available XQA kernels are found for speculative decoding mode.")
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(1)


def main() -> None:
    contract = json.loads(Path(os.environ["STANDIN_CONTRACT"], "trtllm_build_flags.json").read_text())
    args = parser(contract).parse_args()
    how = os.environ.get("STANDIN_BUILD", "ok")
    if record := os.environ.get("STANDIN_RECORD"):
        with Path(record).open("a") as file:
            file.write(json.dumps(sys.argv[1:]) + "\n")
    config = json.loads(Path(args.checkpoint_dir, "config.json").read_text())
    print(f"[TensorRT-LLM] TensorRT-LLM version: {VERSION}", flush=True)
    say(f"[I] Set gemm_plugin to {args.gemm_plugin}.")
    say("[W] Specifying a `max_num_tokens` larger than usual.")
    output = Path(args.output_dir)
    output.mkdir(exist_ok=True)
    if how == "sleep":
        Path(os.environ["STANDIN_PID"]).write_text(str(os.getpid()))
        time.sleep(120)
    if how in ("oom", "kernel", "exit", "killed"):
        (output / "rank0.engine").write_bytes(b"half")
        fail(how)
    ranks = config.get("mapping", {}).get("world_size", 1)
    whole = {"version": VERSION, "pretrained_config": config, "build_config": build_config(args, config)}
    if how == "surprise":
        whole["build_config"]["max_seq_len"] = 1000
    (output / "config.json").write_text(json.dumps(whole))
    for rank in range(ranks - (how == "missing-rank")):
        say("[I] Build TensorRT engine Unnamed Network 0")
        print("[TRT] [I] Engine generation completed in 1.5 seconds.", flush=True)
        say(f"[I] Serializing engine to {output}/rank{rank}.engine...")
        (output / f"rank{rank}.engine").write_bytes(f"engine of rank {rank}".encode() * 100)
        say("[I] Engine serialized. Total time: 00:00:00")
    measured = Path(args.input_timing_cache).read_text() if args.input_timing_cache else ""
    Path(args.output_timing_cache).write_text(measured + "one build's measurements\n")
    say("[I] Total time of building all engines: 00:00:03")


if __name__ == "__main__":
    main()
