"""Make this process and its children believe they are on a GPU host: programs on PATH, packages on the module path."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CONTRACT = ROOT / "tests" / "data" / "trtllm"
GPU_LINE = "NVIDIA H100 80GB HBM3, 81559, 81000, 9.0, 580.82.07"

MPIRUN = """
import os, subprocess, sys
arguments = sys.argv[1:]
assert arguments[0] == "-n" and arguments[2:5] == ["--allow-run-as-root", "--bind-to", "none"], arguments
ranks = int(arguments[1])
children = [
    subprocess.Popen(
        arguments[5:],
        stdin=None if rank == 0 else subprocess.DEVNULL,
        env=os.environ | {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(ranks)},
    )
    for rank in range(ranks)
]
sys.exit(max(child.wait() for child in children))
"""
"""As Open MPI: one process per rank, standard input to the first, each told who it is."""

SRUN = """
import os, subprocess, sys, time
arguments = sys.argv[1:]
kills = "--kill-on-bad-exit=1" in arguments
assert "--overlap" in arguments, "srun: Job step creation temporarily disabled, retrying"
arguments = [word for word in arguments if word not in ("--kill-on-bad-exit=1", "--overlap")]
assert arguments[:4] == ["--mpi=pmix", "--input=0", "-n", arguments[3]], arguments
children = [
    subprocess.Popen(
        arguments[4:],
        stdin=None if rank == 0 else subprocess.DEVNULL,
        env=os.environ | {"SLURM_PROCID": str(rank), "SLURM_NTASKS": arguments[3],
                          "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": arguments[3]},
    )
    for rank in range(int(arguments[3]))
]
while any(child.poll() is None for child in children):
    if kills and any(child.poll() for child in children):
        [child.kill() for child in children]
    time.sleep(0.02)
sys.exit(max(abs(child.wait()) for child in children))
"""
"""Slurm's starter: with `--input=0`, standard input is the first task's; ranks outlive one that failed unless asked."""

LAUNCH = """#!/bin/bash
command="$*"
if [ "$SLURM_PROCID" -ne 0 ]; then
    [ -z "$STANDIN_RANKS" ] || echo $$ > "$STANDIN_RANKS/rank$SLURM_PROCID"
else
    (
        unset ${!OMPI_*} ${!PMIX_*} ${!SLURM_*}
        export TLLM_SPAWN_PROXY_PROCESS=1
        $command
    ) &
fi
until [ -e "$STANDIN_LEADER" ]; do sleep 0.02; done
"""
"""As documented: the command, split at blanks, in the background on rank 0, where a shell takes its input away;
and a server that ends when the LLM is shut down."""


@dataclass
class Host:
    """Where the stand-ins are, and switches for how they behave."""

    path: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def programs(self) -> Path:
        return self.path / "bin"

    @property
    def packages(self) -> Path:
        return self.path / "packages"

    @property
    def record(self) -> Path:
        return self.path / "commands.jsonl"

    def program(self, name: str, text: str) -> None:
        self.programs.mkdir(parents=True, exist_ok=True)
        file = self.programs / name
        file.write_text(text)
        file.chmod(0o755)

    def package(self, name: str, version: str) -> None:
        """Metadata of an installed distribution."""
        for old in self.packages.glob(f"{name}-*.dist-info"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        info = self.packages / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def gpus(self, *lines: str) -> None:
        self.program("nvidia-smi", "#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))

    def slurm(self) -> None:
        """Inside a Slurm job, with the launcher that TensorRT-LLM installs."""
        self.program("srun", f"#!{sys.executable}\n{SRUN}")
        self.program("trtllm-llmapi-launch", LAUNCH)
        self.monkeypatch.setenv("SLURM_JOB_ID", "7")
        self.monkeypatch.setenv("STANDIN_LEADER", str(self.path / "leader-stops"))

    def builds(self, how: str) -> None:
        self.monkeypatch.setenv("STANDIN_BUILD", how)


def make_host(path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """One H100, TensorRT-LLM 1.2.1, trtllm-build."""
    host = Host(path, monkeypatch)
    python = f"#!{sys.executable}\n"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.standins.build_program import main; main()\n"
    host.program("trtllm-build", python + code)
    host.gpus(GPU_LINE)
    host.program("c++", "#!/bin/sh\n")
    host.program("mpirun", python + MPIRUN)
    bindings = host.packages / "tensorrt_llm" / "bindings"
    bindings.mkdir(parents=True)
    (bindings.parent / "__init__.py").write_text("")
    (bindings / "__init__.py").write_text("")
    (bindings / "executor.py").write_text("from tests.standins.bindings import *\n")
    for name, names in (
        ("_tensorrt_engine", "LLM"),
        ("llmapi", "ExtendedRuntimePerfKnobConfig, KvCacheConfig, SamplingParams"),
    ):
        (bindings.parent / name).mkdir()
        (bindings.parent / name / "__init__.py").write_text(f"from tests.standins.llm_api import {names}\n")
    for name in [n for n in sys.modules if n.partition(".")[0] == "tensorrt_llm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("TLLM_WORKER_USE_SINGLE_PROCESS", raising=False)
    for name, version in (("tensorrt_llm", "1.2.1"), ("tensorrt", "10.14.1.48.post1")):
        host.package(name, version)
    monkeypatch.setenv("PATH", f"{host.programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("STANDIN_CONTRACT", str(CONTRACT))
    monkeypatch.setenv("STANDIN_RECORD", str(host.record))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(host.packages), str(ROOT)]))
    monkeypatch.syspath_prepend(str(host.packages))
    return host
