"""Read a checkpoint's `config.json` alone, without weights or torch.

Everything a plan needs (sizes, ranks, quantization, drafter) is in the config, so that planning for a GPU host takes
less than a second. `Checkpoint.open` builds on this and adds the tensors.

    config = read_checkpoint_config(Path("checkpoint"))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.families import REDRAFTER_ARCHITECTURES
from trtllm_redrafter.errors import InputError
from trtllm_redrafter.fsio import read_json


def read_raw_config(path: Path) -> dict[str, Any]:
    """The config JSON of a checkpoint directory; `InputError` if it is missing or of something else."""
    if not path.is_dir():
        raise InputError("the checkpoint directory does not exist", where=path, remedy="check the path")
    raw = read_json(path / "config.json")
    if "architecture" not in raw:
        raise _not_a_checkpoint(path, raw)
    return raw


def read_checkpoint_config(path: Path) -> CheckpointConfig:
    """The parsed config of a checkpoint directory."""
    return CheckpointConfig.from_dict(read_raw_config(path), where=path / "config.json")


def _not_a_checkpoint(path: Path, raw: Mapping[str, object]) -> InputError:
    if "build_config" in raw:
        what, remedy = "this is an engine, not a checkpoint", "pass the checkpoint it was built from"
    elif "exit_dim" in raw:
        what, remedy = "this is a drafter, not a checkpoint", "run `trtllm-redrafter convert --base … --drafter` on it"
    elif "architectures" in raw or "model_type" in raw:
        what, remedy = "this is a Hugging Face model, not a checkpoint", "run `trtllm-redrafter convert --base` on it"
    else:
        what, remedy = "this is not a TensorRT-LLM checkpoint", "check the path"
    why = f"its config.json has no `architecture` such as {next(iter(REDRAFTER_ARCHITECTURES))}"
    return InputError(what, where=path, why=why, remedy=remedy)
