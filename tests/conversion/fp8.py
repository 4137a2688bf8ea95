"""An FP8 checkpoint as NVIDIA's quantizer leaves it, made from a plain one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

QUANTIZED = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


def quantize_fp8(source: Path, target: Path, exclude_modules: list[str] | None) -> Path:
    """Copy a checkpoint with every linear of the layers as float8 and one scale each, equal on all ranks.

    An empty `exclude_modules` is what the exporter writes when it was asked to quantize the LM head too.
    """
    shutil.copytree(source, target)
    (target / "manifest.json").unlink()
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    config["quantization"] = {"quant_algo": "FP8", "kv_cache_quant_algo": None}
    if exclude_modules is not None:
        config["quantization"]["exclude_modules"] = exclude_modules
    (target / "config.json").write_text(json.dumps(config))
    scale = torch.tensor([0.01])
    modules = (*QUANTIZED, "lm_head") if exclude_modules == [] else QUANTIZED
    for file in target.glob("rank*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith(tuple(q + ".weight" for q in modules))]:
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            module = name.removesuffix(".weight")
            tensors[module + ".weights_scaling_factor"] = scale.clone()
            tensors[module + ".activation_scaling_factor"] = torch.tensor([0.02])
        save_file(tensors, file)
    return target
