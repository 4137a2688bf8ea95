"""Engines and processes that fail, hang or disappear: always a message, never a wait without end or a process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.backends.test_trtllm_llm_api import gone
from tests.backends.trtllm_engines import VOCAB, build, expected, run
from tests.standins.host import GPU_LINE, Host, make_host
from trtllm_redrafter.backends.base import FinishReason, Runner
from trtllm_redrafter.backends.tensorrt_llm import child, remote_client
from trtllm_redrafter.backends.tensorrt_llm.backend import TensorRTLLMBackend
from trtllm_redrafter.backends.tensorrt_llm.child import run_logged
from trtllm_redrafter.backends.tensorrt_llm.failures import build_error
from trtllm_redrafter.backends.tensorrt_llm.remote_client import RemoteClient
from trtllm_redrafter.errors import BackendError, InputError


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    found = make_host(tmp_path / "host", monkeypatch)
    found.gpus(GPU_LINE, GPU_LINE)
    (ranks := tmp_path / "ranks").mkdir()
    monkeypatch.setenv("STANDIN_RANKS", str(ranks))
    return found


def load(engine: Path, api: str | None = None) -> Runner:
    return TensorRTLLMBackend().load(engine, device="auto", verify_hashes=False, draft_shape=None, api=api)


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in (folder / "ranks").iterdir()]


@pytest.mark.parametrize("how", ["", "keep-end", "overrun", "none"])
def test_the_end_is_the_same_however_it_is_told(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("STANDIN_RUN", how)
    runner = load(build(checkpoints, tmp_path))
    start = next(p for p in range(3, VOCAB) if 2 in expected((p,), 9)[3:7])
    (result,) = run(runner, (start,))
    assert result.token_ids == expected((start,), 20) and result.finish_reason is FinishReason.STOP
    assert result.steps + result.accepted_tokens == len(result.token_ids) - 1
    assert sum(result.accepted_per_position) == result.accepted_tokens, "the end costs no figure by position"


def test_a_stop_string_in_merged_responses(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request ends here and not in the executor, and its steps are still the executor's iterations."""
    engine = build(checkpoints, tmp_path)
    (whole,) = run(load(engine), (258,), ignore_eos=True)
    monkeypatch.setenv("STANDIN_RUN", "pairs")
    (stopped,) = run(load(engine), (258,), ignore_eos=True, stop=(whole.text[2:4],))
    assert stopped.text == whole.text[:2] and stopped.accepted_per_position == []
    assert stopped.acceptance_rate is None or stopped.acceptance_rate <= 1.0


@pytest.mark.parametrize("name", ["one", "two"])
def test_an_engine_that_fails_while_running(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In this process, and in a rank whose shutdown waits for the others for ever."""
    monkeypatch.setenv("STANDIN_RUN", "poll-error")
    runner = load(build(checkpoints, tmp_path, name))
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(BackendError, match="failed while running") as caught:
            run(runner, (5, 6))
        assert "illegal access" in caught.value.render()
    assert time.monotonic() - start < 30
    if name == "two":
        runner.close()
        assert gone(pids(tmp_path))


def test_a_rank_that_dies_while_loading_in_slurm(
    host: Host, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun leaves the others waiting unless it is told not to."""
    host.slurm()
    monkeypatch.setenv("STANDIN_RUN", "lost-rank")
    engine = build(checkpoints, tmp_path, "two")
    with pytest.raises(BackendError, match="ended unexpectedly"):
        load(engine)
    assert gone(pids(tmp_path))


def test_what_came_before_the_end_is_given_out_first(host: Host, tmp_path: Path) -> None:
    """And libraries may print JSON of their own."""
    event = {"event": {"number": 1, "token_ids": [3]}}
    lines = ['{"level": "info"}', "{}", json.dumps({"ready": True}), '{"event of another": 1}', json.dumps(event)]
    script = f"import sys; print({os.linesep.join(lines)!r}, flush=True); print('last words', file=sys.stderr)"
    monkeypatch = host.monkeypatch
    monkeypatch.setattr(remote_client, "worker_command", lambda *_: [sys.executable, "-c", script])
    client = RemoteClient(tmp_path, 1, api="executor")
    time.sleep(0.5)
    assert [e.token_ids for e in client.poll(5)] == [(3,)]
    for _ in range(2):
        with pytest.raises(BackendError, match="last words"):
            client.poll(0.1)
    with pytest.raises(BackendError, match="last words"):
        client.cancel(1)
    client.close()
    client.close()


def test_workers_that_never_load(host: Host, tmp_path: Path) -> None:
    """Ranks that cannot reach each other wait in silence."""
    script = "import sys, time; print('NCCL INFO waiting', file=sys.stderr, flush=True); time.sleep(600)"
    host.monkeypatch.setattr(remote_client, "worker_command", lambda *_: [sys.executable, "-c", script])
    host.monkeypatch.setattr(remote_client, "LOAD_SECONDS", 0.5)
    with pytest.raises(BackendError, match="not been loaded") as caught:
        RemoteClient(tmp_path, 1, api="executor")
    assert "NCCL INFO waiting" in caught.value.render() and "--ipc host" in caught.value.render()


def test_an_impatient_user_leaves_nothing_behind(host: Host, tmp_path: Path) -> None:
    """Ctrl-C while `close` waits for workers that do not listen."""
    script = "import json, signal, time; print(json.dumps({'ready': 1}), flush=True); time.sleep(600)"
    host.monkeypatch.setattr(remote_client, "worker_command", lambda *_: [sys.executable, "-c", script])
    client = RemoteClient(tmp_path, 1, api="executor")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            client.close()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert gone([client._child.pid])


def test_a_worker_ends_when_its_pipe_breaks_off(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    """A parent that is killed while it writes leaves half a message; the worker must not keep the GPU for it."""
    engine = build(checkpoints, tmp_path)
    command = [sys.executable, "-m", "trtllm_redrafter.backends.tensorrt_llm.worker", str(engine), "--api", "executor"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        assert json.loads(worker.stdout.readline()) == {"ready": True}
        worker.stdin.write('{"op": "submit", "requ')
        worker.stdin.close()
        try:
            assert worker.wait(20) == 0
        finally:
            worker.kill()


def test_nothing_is_started_for_an_engine_with_a_bad_tokenizer(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    engine = build(checkpoints, tmp_path, "two")
    (engine / "tokenizer" / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="an unknown file of the tokenizer"):
        load(engine)
    assert not pids(tmp_path)


def test_every_gpu_and_the_compiler_must_fit(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    engine = build(checkpoints, tmp_path, "two")
    host.gpus(GPU_LINE, "NVIDIA L40S, 46068, 45000, 8.9, 580.82.07")
    host.package("tensorrt", "10.13.0")
    with pytest.raises(BackendError) as caught:
        load(engine)
    assert "not for NVIDIA L40S" in caught.value.render() and "TensorRT 10.14.1" in caught.value.render()


def test_a_process_left_behind_does_not_hold_up_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the pipe open in a session of its own, where no signal of ours reaches it."""
    monkeypatch.setattr(child, "_TICK_SECONDS", 0.1)
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.2)
    code = (
        "import subprocess, sys; print('built', flush=True); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(15)'], start_new_session=True)"
    )
    lines: list[str] = []
    start = time.monotonic()
    done = run_logged([sys.executable, "-c", code], log=tmp_path / "log", on_line=lines.append, on_tick=lambda s: None)
    assert done == 0 and lines == ["built"] and time.monotonic() - start < 10


def test_a_killed_build_is_not_taken_for_another_failure(tmp_path: Path) -> None:
    """TensorRT warns of tactics that did not fit on the GPU in builds that go well, too."""
    log = tmp_path / "log"
    log.write_text("[W] Requested amount of GPU memory (24793579520 bytes) could not be allocated.\n")
    assert "was killed" in build_error(-9, log).render() and "main memory" in build_error(137, log).render()
    log.write_text(log.read_text() + "concurrent.futures.process.BrokenProcessPool: A process in the process pool\n")
    assert "was killed" in build_error(1, log).render()
