"""What is recorded of machine and memory, and the roof that steps are held against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines import make_runner
from trtllm_redrafter.backends.base import EngineInfo
from trtllm_redrafter.benchmark import environment
from trtllm_redrafter.benchmark.report import _clock
from trtllm_redrafter.checkpoint.config import read_checkpoint_config
from trtllm_redrafter.planning.gpus import gpu
from trtllm_redrafter.planning.memory import weight_bytes


def gpu_engine(path: Path, device: str) -> EngineInfo:
    return EngineInfo(path, "tensorrt-llm", device, "bfloat16", 64, 4, 100, 200, None)


def test_this_machine(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    found = environment.describe(runner.info, ("trtllm-redrafter", "bench", "engine"))
    json.dumps(found, allow_nan=False)
    assert found["machine"]["cores"] >= 1 and "gpu" not in found["machine"]
    assert found["command"] == "trtllm-redrafter bench engine" and found["versions"]["torch"]
    after = environment.afterwards(runner.info)
    assert after["memory"]["peak_resident_bytes"] > 50e6
    roof = environment.roof(runner.info)
    assert roof["weight_bytes"] == weight_bytes(read_checkpoint_config(runner.info.path / "checkpoint")).base
    assert roof["bandwidth"] > 1e8 and roof["bandwidth_from"] == "measured on this machine"


LIMITS = {"max_batch_size": 4, "max_input_len": 64, "max_seq_len": 128}


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "4 x NVIDIA H100 80GB HBM3"])
def test_a_gpu_of_the_table(tmp_path: Path, device: str) -> None:
    make_runner(tmp_path)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    engine = tmp_path / "trt"
    engine.mkdir()
    (engine / "config.json").write_text(json.dumps({"pretrained_config": config, "build_config": LIMITS}))
    roof = environment.roof(gpu_engine(engine, device))
    assert roof["bandwidth"] == gpu("h100-80gb").bandwidth and "data sheet" in roof["bandwidth_from"]
    assert environment.roof(gpu_engine(engine, "NVIDIA Nothing"))["bandwidth"] is None
    assert environment.machine(gpu_engine(engine, device))["gpu"] == "NVIDIA H100 80GB HBM3"


def test_clocks_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 2619, 1980'\necho '345, 2619, 1980'\necho 'No answer'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = environment.clocks(gpu_engine(tmp_path, "2 x NVIDIA H100 80GB HBM3"))
    assert found["gpus"][1] == {"sm_mhz": "345", "memory_mhz": "2619", "max_sm_mhz": "1980"} and len(found["gpus"]) == 2
    assert _clock(found).endswith("GPU 1: 345 of 1980 MHz, memory 2619 MHz")
    monkeypatch.setenv("PATH", "")
    assert environment.gpu_clocks() == []


def test_the_gpu_that_an_engine_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    info = EngineInfo(tmp_path, "torch", "cuda:1 (cuda-graphs: x)", "bfloat16", 64, 4, 100, 200, None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {"cuda:1": 7}[device])
    assert environment.machine(info)["gpu"] == "GPU cuda:1"
    assert environment.memory(info)["peak_gpu_bytes"] == 7
