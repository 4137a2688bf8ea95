"""Whatever goes wrong, and whenever: no output, no leftovers, no threads."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conversion.conftest import Options
from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.conversion import writer
from trtllm_redrafter.conversion.plan import ConversionPlan, plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.errors import InputError, OutputError
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.verify.files import verify_files


class Boom(Exception):
    """The injected failure."""


@pytest.fixture
def plan(tmp_path: Path, options: Options) -> ConversionPlan:
    base, drafter = write_base(tmp_path / "base"), write_drafter(tmp_path / "drafter")
    return plan_conversion(options(base, drafter, tp_size=2))


def assert_clean(tmp_path: Path, plan: ConversionPlan) -> None:
    """Nothing but the inputs is there, and a second try succeeds."""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "drafter"]
    deadline = time.monotonic() + 5
    while any(t.name.startswith(("convert", "sha256")) for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert verify_files(convert(plan, no_progress), hashes=True).ok


STAGES = [
    (writer, "reserve"),
    (writer, "_write_block"),
    (writer, "_write_stored"),
    (writer, "hash_inputs"),
    (writer, "write_rank"),
    (writer, "write_json"),
    (writer.shutil, "copyfile"),
    (Manifest, "write"),
]


@pytest.mark.parametrize("failure", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize(("owner", "name"), STAGES, ids=[name for _, name in STAGES])
def test_failure_at_each_stage(
    owner: Any, name: str, failure: type[BaseException], tmp_path: Path, plan: ConversionPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    with monkeypatch.context() as patch, pytest.raises(failure):
        patch.setattr(owner, name, fail)
        convert(plan, no_progress)
    assert_clean(tmp_path, plan)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.8, 0.99])
def test_failure_after_some_writes(
    share: float, tmp_path: Path, plan: ConversionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = os.pwrite, []

    def count(*args: Any) -> int:
        made.append(args)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", count)
        shutil.rmtree(convert(plan, no_progress))
    last = int(len(made) * share)
    made.clear()

    def fail_later(*args: Any) -> int:
        if len(made) == last:
            raise OSError(errno.ENOSPC, "No space left on device")
        return count(*args)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="disk is full") as e:
        patch.setattr(os, "pwrite", fail_later)
        convert(plan, no_progress)
    assert e.value.problem.remedy and str(tmp_path / "out") in str(e.value)
    assert_clean(tmp_path, plan)


def test_interrupt_from_the_progress_display(tmp_path: Path, plan: ConversionPlan) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, interrupt)
    assert_clean(tmp_path, plan)


def test_an_input_that_shrinks_meanwhile(tmp_path: Path, plan: ConversionPlan) -> None:
    file = tmp_path / "base" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:2000])
    with pytest.raises(InputError, match="shorter while it was read") as e:
        convert(plan, no_progress)
    assert str(file) in str(e.value)
    file.write_bytes(content)
    assert_clean(tmp_path, plan)


def test_overwriting_keeps_the_old_checkpoint_when_it_fails(
    tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base")
    out = convert(plan_conversion(options(base)), no_progress)
    before = (out / "rank0.safetensors").read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise Boom

    with monkeypatch.context() as patch, pytest.raises(Boom):
        patch.setattr(Manifest, "write", fail)
        convert(plan_conversion(options(base, dtype="bfloat16", overwrite=True)), no_progress)
    assert (out / "rank0.safetensors").read_bytes() == before
    convert(plan_conversion(options(base, dtype="bfloat16", overwrite=True)), no_progress)
    assert (out / "rank0.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


SLOW = """
    import sys, time
    from pathlib import Path
    from trtllm_redrafter.conversion.writer import convert
    from trtllm_redrafter.conversion.options import ConvertOptions
    from trtllm_redrafter.conversion import writer
    from trtllm_redrafter.conversion.plan import plan_conversion
    from trtllm_redrafter.progress import no_progress
    real = writer._write_block
    def slow(*args):
        print("writing", flush=True)
        time.sleep(0.05)
        return real(*args)
    writer._write_block = slow
    base, out = map(Path, sys.argv[1:])
    options = ConvertOptions(base=base, drafter=None, output=out, dtype="auto", tp_size=2, num_beams=None,
                             draft_len=None, greedy=True, parallel_embedding=False, workers=2, overwrite=False)
    try:
        convert(plan_conversion(options), no_progress)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start_slow_conversion(base: Path, out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), str(base), str(out)], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("writing")
    return process


def test_control_c(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    process = start_slow_conversion(base, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_killed_run_is_cleaned_up_by_the_next(tmp_path: Path, options: Options) -> None:
    base = write_base(tmp_path / "base")
    process = start_slow_conversion(base, tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    convert(plan_conversion(options(base)), no_progress)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
