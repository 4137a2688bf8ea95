"""Vectors computed by TensorRT-LLM's own graph code: which cases there are, and their tensors.

`REDRAFTER_GOLDEN_DIR` names another directory with the same files, so that further cases can be run unseen.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trtllm_redrafter.redrafter.config import DrafterConfig
from trtllm_redrafter.redrafter.drafter import Drafter

DIRECTORY = Path(os.environ.get("REDRAFTER_GOLDEN_DIR") or Path(__file__).parent.parent / "data" / "golden")
INDEX: dict[str, Any] = json.loads((DIRECTORY / "index.json").read_text())
TOLERANCE = {"atol": INDEX["atol"], "rtol": INDEX["rtol"]}


def cases(kind: str) -> list[str]:
    return [name for name, case in INDEX["cases"].items() if case["kind"] == kind]


def load(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The case's description and its tensors, named without the case."""
    kind, name = case.split("/", 1)
    tensors = load_file(DIRECTORY / f"{kind}.safetensors")
    prefix = name + "/"
    return INDEX["cases"][case], {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load_empty(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same case with a batch of no rows: its inputs and outputs cut to nothing, its weights as they are."""
    description, tensors = load(case)
    cut = {k: v if k.startswith("param.") else v[:0] for k, v in tensors.items()}
    return description | {"accepted": []}, cut


def drafter_of(case: dict[str, Any], tensors: dict[str, Tensor]) -> Drafter:
    config = DrafterConfig(case["vocab"], case["hidden"], case["exit_dim"], case["layers"], case["rnn"])
    drafter = Drafter(config)
    state = {}
    for name in config.parameter_shapes():
        short = name.replace(".linear.", ".").replace("lm_head.weight", "lm_head")
        state[name] = tensors["param." + short].float()
    drafter.load_state_dict(state)
    return drafter


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), **TOLERANCE)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.to(torch.int64), expected.to(torch.int64), rtol=0, atol=0)
