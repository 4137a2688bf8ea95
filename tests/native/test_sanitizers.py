"""The kernels' entry points under AddressSanitizer and UndefinedBehaviorSanitizer, fuzzed with a seed.

`make fuzz` runs a long campaign of the same; REDRAFTER_FUZZ_ROUNDS and REDRAFTER_FUZZ_SEED choose another.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from trtllm_redrafter.backends.torch.native.compiled import SOURCES, NativeUnavailable, find_compiler

CHECKS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
FLAGS = ("-std=c++20", "-O1", "-g1", "-march=native", "-ffp-contract=off", "-pthread", "-fno-omit-frame-pointer")


def build(folder: Path, source: Path) -> tuple[Path, str]:
    """The program and what the compiler said; the program is missing where that failed."""
    program = folder / source.stem
    command = [find_compiler(), *FLAGS, *CHECKS, f"-I{SOURCES}", str(source), "-o", str(program)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return program, run.stderr


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to build in, where the compiler has both sanitizers and their programs run."""
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "probe.cpp").write_text("#include <atomic>\nint main() { return std::atomic<int>(0).load(); }\n")
    try:
        program, said = build(folder, folder / "probe.cpp")
    except NativeUnavailable as unavailable:
        pytest.skip(str(unavailable))
    if not program.exists():
        pytest.skip(f"the compiler lacks AddressSanitizer or UndefinedBehaviorSanitizer: {said.strip()[:200]}")
    run = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip(f"programs with sanitizers do not run here: {run.stderr.strip()[:200]}")
    return folder


def test_nothing_is_found_by_fuzzing(sanitizers: Path) -> None:
    program, said = build(sanitizers, Path(__file__).with_name("fuzz_kernels.cpp"))
    assert program.exists(), said
    rounds, seed = os.environ.get("REDRAFTER_FUZZ_ROUNDS", "60"), os.environ.get("REDRAFTER_FUZZ_SEED", "1")
    run = subprocess.run([str(program), rounds, seed], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == f"{rounds} rounds, seed {seed}: nothing found\n"
