"""What is recorded of machine and memory, and the roof that steps are held against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines import make_runner
from trtllm_redrafter.backends.base import EngineInfo
from trtllm_redrafter.benchmark import environment
from trtllm_redrafter.planning.gpus import gpu
from trtllm_redrafter.planning.sizes import weight_bytes


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
    assert roof["weight_bytes"] == weight_bytes(environment.engine_config(runner.info.path)).streamed
    assert roof["bandwidth"] > 1e8 and roof["bandwidth_from"] == "measured on this machine"


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "4 x NVIDIA H100 80GB HBM3"])
def test_a_gpu_of_the_table(tmp_path: Path, device: str) -> None:
    make_runner(tmp_path)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    engine = tmp_path / "trt"
    engine.mkdir()
    (engine / "config.json").write_text(json.dumps({"pretrained_config": config, "build_config": {}}))
    roof = environment.roof(gpu_engine(engine, device))
    assert roof["bandwidth"] == gpu("h100-80gb").bandwidth and "data sheet" in roof["bandwidth_from"]
    assert environment.roof(gpu_engine(engine, "NVIDIA Nothing"))["bandwidth"] is None
    assert environment.machine(gpu_engine(engine, device))["gpu"] == "NVIDIA H100 80GB HBM3"
