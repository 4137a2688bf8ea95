"""`doctor` on hosts of every kind: what it says, what it imports (nothing), how it exits."""

from __future__ import annotations

import ctypes.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.tiny import Program
from tests.standins.host import GPU_LINE, Host, make_host
from trtllm_redrafter.backends.tensorrt_llm.machine import find_gpus
from trtllm_redrafter.doctor import Check, DoctorReport, Needs, State, checks, examine
from trtllm_redrafter.doctor.checks import OWN_REQUIREMENTS
from trtllm_redrafter.doctor.host import MainMemory, main_memory

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs" / "llama-3.1-8b.yaml"


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A GPU host on which everything fits, whatever this machine is."""
    found = make_host(tmp_path / "host", monkeypatch)
    for name, version in (("torch", "2.9.1"), ("transformers", "4.57.3"), ("numpy", "1.26.4")):
        found.package(name, version)
    monkeypatch.setattr(platform, "python_version", lambda: "3.12.3")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "libmpi.so.40")
    return found


def states(report: DoctorReport) -> dict[str, State]:
    return {check.name: check.state for check in report.checks}


def check(report: DoctorReport, name: str) -> Check:
    return next(c for c in report.checks if c.name == name)


def test_a_fitting_host_serves_both(host: Host) -> None:
    report = examine(None)
    assert {c.state for c in report.checks if c.backends != ("tensorrt",)} == {State.OK}, report.render()
    assert report.serves("torch") and report.serves("tensorrt-llm")
    assert "NVIDIA H100 80GB HBM3 (86 GB, sm_90)" in report.render()


def test_compilers_of_the_tensorrt_backend(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that compiles for the recipe's GPU is needed, whatever else there is."""
    versions = {"onnx": "1.23.2", "onnxruntime": None, "tensorrt-rtx-cu13-bindings": "1.7.1.116", "tensorrt": None}
    known = checks.installed_version

    def installed(name: str) -> str | None:
        return versions[name] if name in versions else None if name == "tensorrt_rtx" else known(name)

    monkeypatch.setattr(checks, "installed_version", installed)
    assert examine(None).serves("tensorrt")
    for gpu, serves in (("rtx-4090", True), ("h100-80gb", False)):
        report = examine(Needs("1.2.1", gpu, 1, Path("engine"), 1, 1, 1))
        assert report.serves("tensorrt") is serves, report.render()
    versions["onnx"] = None
    assert "tensorrt      cannot: onnx" in examine(None).render()


@pytest.mark.parametrize(
    ("package", "version", "name", "state", "says"),
    [
        ("tensorrt_llm", "1.3.0rc22", "tensorrt_llm", State.FAIL, "removed"),
        ("tensorrt_llm", "0.13.0", "tensorrt_llm", State.FAIL, "recurrence"),
        ("tensorrt_llm", "1.1.0", "tensorrt_llm", State.WARN, "planned for"),
        ("torch", "2.13.0", "torch for TensorRT-LLM", State.FAIL, "2.10"),
        ("torch", "2.4.0", "torch", State.FAIL, ">=2.9"),
        ("tensorrt", "10.11.0", "tensorrt for TensorRT-LLM", State.FAIL, "10.14"),
        ("transformers", "4.57.1", "transformers for TensorRT-LLM", State.WARN, "4.57.3"),
        ("numpy", "2.1.0", "numpy for TensorRT-LLM", State.WARN, "<2"),
    ],
)
def test_versions_are_compared_before_anything_is_imported(
    host: Host, package: str, version: str, name: str, state: State, says: str
) -> None:
    host.package(package, version)
    found = check(examine(None), name)
    assert found.state is state and says in found.found and found.remedy


def test_gpus_and_drivers(host: Host) -> None:
    host.gpus("Tesla V100-SXM2-32GB, 32768, 32000, 7.0, 580.82.07")
    report = examine(None)
    assert states(report)["gpu"] is State.FAIL and report.serves("torch") and not report.serves("tensorrt-llm")
    host.gpus(GPU_LINE.replace("580.82.07", "535.10"))
    assert states(examine(None))["driver"] is State.WARN and examine(None).serves("tensorrt-llm")
    host.program("nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert states(examine(None))["gpu"] is State.FAIL


def test_a_driver_that_answers_oddly_is_no_crash(host: Host) -> None:
    host.gpus("NVIDIA H100 80GB HBM3, [N/A], 1, 9.0, 580", GPU_LINE, "")
    assert [gpu.memory_bytes for gpu in find_gpus()] == [81559 * 2**20]


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, "ABC"), ("", ""), ("2,0", "CA"), ("1", "B"), ("-1", ""), ("0,7,1", "A"), ("GPU-1234", "ABC")],
)
def test_only_visible_gpus_count(host: Host, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: str) -> None:
    host.gpus(*(f"{name}, 81559, 81000, 9.0, 580" for name in "ABC"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "".join(gpu.name for gpu in find_gpus()) == names


def test_python_and_mpi(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.11.7")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    report = examine(None)
    assert states(report)["python"] is State.FAIL and states(report)["libmpi"] is State.FAIL
    assert report.serves("torch") and "cannot: python, libmpi" in report.render()


def test_mpi_of_a_container_is_found(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    (tmp_path / "libmpi.so.40").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert check(examine(None), "libmpi").found == str(tmp_path / "libmpi.so.40")


def test_a_recipe_adds_its_needs(host: Host, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program("doctor", RECIPE, "--json")
    names = {c["name"] for c in program.document["checks"]}
    assert {"recipe: gpu", "recipe: disk", "recipe: memory"} <= names
    huge = ["--set", "base=models/Llama-3.3-70B-Instruct", "--set", "convert.tp_size=4"]
    assert program("doctor", RECIPE, *huge, "--json") == 6
    found = {c["name"]: c for c in program.document["checks"]}
    assert found["recipe: gpu"]["state"] == "fail" and "1 of 4" in found["recipe: gpu"]["found"]
    assert "1 rank(s)" in found["recipe: memory"]["found"]
    program("doctor", RECIPE, *huge, "--set", "tensorrt_llm.workers=8", "--json")
    assert any("build 4 rank(s) at a time" in c["found"] for c in program.document["checks"])
    assert not program.document["able"] and program.document["serves"]["tensorrt-llm"] is False
    host.gpus(GPU_LINE.replace("81000", "20000"))
    program("doctor", RECIPE, "--json")
    busy = next(c for c in program.document["checks"] if c["name"] == "recipe: gpu")
    assert busy["state"] == "warn" and "only 25 % free" in busy["found"]


def test_the_limit_of_a_container_or_job_is_what_counts(tmp_path: Path) -> None:
    """The machine's memory is not what a build may use of it."""
    here = main_memory().total
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 5000 kB\n")
    assert main_memory(tmp_path) == MainMemory(here, 5000 * 1024, None)
    job = tmp_path / "sys" / "fs" / "cgroup" / "jobs" / "seven"
    job.mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/jobs/seven\n")
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("4000000\n")
    (tmp_path / "sys" / "fs" / "cgroup" / "memory.max").write_text(f"{2 * here}\n")
    found = main_memory(tmp_path)
    assert (found.limit, found.usable, found.free) == (4000000, 4000000, 4000000)
    (tmp_path / "proc" / "self" / "cgroup").write_text("5:cpu,cpuacct:/a\n4:memory:/docker/x\n")
    (old := tmp_path / "sys" / "fs" / "cgroup" / "memory").mkdir()
    (old / "memory.limit_in_bytes").write_text("3000000\n")
    assert main_memory(tmp_path).limit == 3000000


def test_memory_that_is_there_but_not_free(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(memory: MainMemory, workers: int = 1) -> Check:
        monkeypatch.setattr(checks, "main_memory", lambda: memory)
        needs = Needs("1.2.1", "h100-80gb", 1, Path("engine"), workers, 10**6, workers * 20 * 10**9)
        return check(examine(needs), "recipe: memory")

    gb = 10**9
    assert judged(MainMemory(64 * gb, 50 * gb, None)).state is State.OK
    assert judged(MainMemory(64 * gb, 9 * gb, None)).state is State.WARN
    limited = judged(MainMemory(64 * gb, 50 * gb, 16 * gb))
    assert limited.state is State.FAIL and "limited by container or job" in limited.found
    assert judged(MainMemory(64 * gb, 60 * gb, None), workers=4).state is State.FAIL


def test_containers_get_their_own_hints(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Needs("1.2.1", "h100-80gb", 2, Path("engine"), 1, 1, 1)
    host.gpus(GPU_LINE, GPU_LINE)
    monkeypatch.setattr(checks, "shared_memory_bytes", lambda: 64 * 2**20)
    monkeypatch.setattr(checks, "inside_container", lambda: False)
    assert "recipe: shared memory" not in states(examine(needs))
    monkeypatch.setattr(checks, "inside_container", lambda: True)
    small = check(examine(needs), "recipe: shared memory")
    assert small.state is State.WARN and "--ipc host" in (small.remedy or "")
    host.gpus()
    assert "--gpus all" in (check(examine(None), "gpu").remedy or "")
    monkeypatch.setattr(checks, "inside_container", lambda: False)
    assert "GPU host" in (check(examine(None), "gpu").remedy or "")


def test_a_recipe_for_more_memory_or_several_ranks(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 has the H200's compute capability, and not its memory: the build would refuse it."""
    needs = Needs("1.2.1", "h200", 2, Path("engine"), 1, 1, 1)
    host.gpus(GPU_LINE, GPU_LINE)
    report = examine(needs)
    assert "0 of 2" in check(report, "recipe: gpu").found and not report.serves("tensorrt-llm")
    assert states(report)["recipe: mpirun"] is State.OK
    monkeypatch.setattr(checks, "find_program", lambda name: None)
    assert states(examine(needs))["recipe: mpirun"] is State.WARN


def test_this_machine_serves_the_embedded_backend(program: Program) -> None:
    assert program("doctor", "--json") == 0
    assert program.document["serves"]["torch"] and program.document["backend"] == "torch"


def test_doctor_imports_nothing_heavy() -> None:
    code = (
        "import sys; from trtllm_redrafter.cli import run_app; run_app(['doctor']); "
        "bad = {'torch', 'transformers', 'tensorrt_llm', 'tensorrt'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_own_requirements_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}{needed}"' in text for name, needed in OWN_REQUIREMENTS.items())
