"""The engine in worker processes, driven over a pipe.

The calling process may be the command line, a server or a notebook. It needs no MPI, and a rank that crashes becomes an
error with the worker's last output instead of taking this process down. What starts the ranks:

    executor   mpirun, or srun inside a Slurm job: one worker per GPU
    llm        the LLM API, from the one worker it lives in; inside a Slurm job srun and trtllm-llmapi-launch
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.tensorrt_llm.child import end_group
from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest, Event
from trtllm_redrafter.backends.tensorrt_llm.failures import explain
from trtllm_redrafter.backends.tensorrt_llm.llmapi_launch import LAUNCHER, MODULE, OUTSIDE, WORKER
from trtllm_redrafter.backends.tensorrt_llm.machine import find_program
from trtllm_redrafter.backends.tensorrt_llm.options import Api
from trtllm_redrafter.errors import BackendError, Problem

_END_SECONDS = 30.0
LOAD_SECONDS = 3600.0
"""A 70B engine from a slow disk takes half of it. Ranks that cannot reach each other would never answer."""

_READER_SECONDS = 2.0
_LAST_WORDS = 2000
_LOG_BYTES = 2**20
_KINDS = {"ready", "event", "fatal", "ended"}


def worker_command(
    engine: Path, ranks: int, api: Api, environment: Mapping[str, str], kv_cache_tokens: int | None = None
) -> list[str]:
    """The whole command that starts the workers of an engine here."""
    python, worker = [sys.executable, "-m"], [str(engine.absolute()), "--api", api]
    if kv_cache_tokens is not None:
        worker += ["--kv-cache-tokens", str(kv_cache_tokens)]
    if api == "executor":
        return [*launch_command(ranks, environment), *python, WORKER, *worker]
    if ranks == 1 or not _in_slurm(environment):
        return [*python, WORKER, *worker]
    _check_launcher([sys.executable, *worker], environment)
    return [*_srun(ranks), *python, MODULE, OUTSIDE, *worker]


def launch_command(ranks: int, environment: Mapping[str, str]) -> list[str]:
    """How to start one process per GPU here. Inside a Slurm job that is srun, which knows the hosts."""
    if _in_slurm(environment):
        return _srun(ranks)
    if find_program("mpirun") is None:
        raise BackendError(
            f"the engine needs {ranks} processes and mpirun is not installed",
            remedy="apt-get install libopenmpi-dev openmpi-bin, or use the release container",
        )
    # unbound: by itself mpirun ties each of two ranks to one core, which the executor's threads would share
    return ["mpirun", "-n", str(ranks), "--allow-run-as-root", "--bind-to", "none"]


def _in_slurm(environment: Mapping[str, str]) -> bool:
    return "SLURM_JOB_ID" in environment and find_program("srun") is not None


def _srun(ranks: int) -> list[str]:
    """Standard input goes to the first task alone; srun's default is a copy for each.

    By default, srun keeps the other ranks running when one dies, and they wait for it forever; and srun itself waits
    forever where a step of the job, such as an interactive shell, already holds the GPUs.
    """
    return ["srun", "--mpi=pmix", "--input=0", "--overlap", "--kill-on-bad-exit=1", "-n", str(ranks)]


def _check_launcher(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """The launcher must be there; it splits its command at blanks, and expands what looks like a pattern."""
    if shutil.which(LAUNCHER, path=_with_python(environment)) is None:
        why = "inside a Slurm job the LLM API needs it to start one process per GPU"
        remedy = "it is installed with tensorrt_llm: put its folder on PATH; or use tensorrt_llm.api: executor"
        raise BackendError(f"{LAUNCHER} is not installed", why=why, remedy=remedy)
    for word in words:
        if re.fullmatch(r"[\w./:=+,@%-]+", word) is None:
            why = f"{LAUNCHER} splits its command at blanks and expands patterns"
            remedy = "use a path of letters, digits and ._-/ only; or tensorrt_llm.api: executor"
            raise BackendError(f"the path {word!r} cannot be passed on", why=why, remedy=remedy)


def _with_python(environment: Mapping[str, str]) -> str:
    """PATH with this interpreter's folder first: the launcher starts `python3` by name."""
    return os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])


def worker_environment(ranks: int, api: Api, device: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The workers' environment. The LLM API takes no GPU number, so it sees only the GPU that was asked for."""
    found = dict(environment)
    if api == "llm":
        found["PATH"] = _with_python(environment)
        if ranks == 1:  # else it starts a process by MPI for one GPU too, which fails on many hosts
            found.setdefault("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    if device is not None:
        visible = [part.strip() for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
        found["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) else str(device)
    return found


class RemoteClient:
    """The worker processes of one engine."""

    def __init__(
        self, engine: Path, ranks: int, *, api: Api, device: int | None = None, kv_cache_tokens: int | None = None
    ) -> None:
        command = worker_command(engine, ranks, api, os.environ, kv_cache_tokens)
        environment = worker_environment(ranks, api, device, os.environ)
        self._engine = engine
        self._failure: BackendError | None = None
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed in close()
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        try:
            self._reader.start()
            self._await_ready()
        except BaseException:
            end_group(self._child)  # a launcher may wait forever for an engine that did not load
            self.close()
            raise

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            message = _message(line)
            if message is not None and "ended" in message:
                break  # what started the worker may go on without it
            if message is not None:
                self._messages.put(message)
        self._messages.put(None)

    def _await_ready(self) -> None:
        try:
            message = self._messages.get(timeout=LOAD_SECONDS)
        except queue.Empty:
            what = f"the engine has not been loaded after {LOAD_SECONDS / 60:.0f} minutes"
            remedy = "run `trtllm-redrafter doctor`; in a container, several ranks need shared memory (--ipc host)"
            raise BackendError(what, where=self._engine, why=self._last_words() or None, remedy=remedy) from None
        if message is None or "fatal" in message:
            raise self._fail(message)

    def submit(self, request: ClientRequest) -> None:
        self._send({"op": "submit", "request": request.as_dict()})

    def cancel(self, number: int) -> None:
        self._send({"op": "cancel", "number": number})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except (OSError, ValueError) as error:
            raise self._fail(self._last_message()) from error

    def poll(self, timeout: float) -> list[Event]:
        """Events from before the workers ended are returned first; after that, every call raises."""
        events: list[Event] = []
        deadline = time.monotonic() + timeout
        while self._failure is None:
            wait = 0.0 if events else max(0.0, deadline - time.monotonic())
            try:
                message = self._messages.get(timeout=wait) if wait > 0 else self._messages.get_nowait()
            except queue.Empty:
                return events
            if message is None or "fatal" in message:
                self._fail(message)
            elif "event" in message:
                events.append(Event.from_dict({"token_ids": [], **message["event"]}))
        if events:
            return events
        raise self._failure

    def close(self) -> None:
        """Ask the workers to exit; end them if they do not, or if the user interrupts the wait."""
        try:
            if self._child.stdin is not None and not self._child.stdin.closed:
                with suppress(OSError):  # the other end of the pipe is gone
                    self._child.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_END_SECONDS)
        finally:
            end_group(self._child)
            self._reader.join(_READER_SECONDS)
            if self._child.stdout is not None and not self._reader.is_alive():
                self._child.stdout.close()
            self._log.close()

    def _last_message(self) -> dict[str, Any] | None:
        """The workers' last message, if it says why they ended."""
        with suppress(queue.Empty):
            while (message := self._messages.get_nowait()) is not None:
                if "fatal" in message:
                    return message
        return None

    def _fail(self, message: dict[str, Any] | None) -> BackendError:
        """What to raise from now on. Remaining ranks are ended at once: they may hold GPUs and wait forever."""
        if self._failure is None:
            end_group(self._child)
            self._failure = self._died() if message is None else _said(message["fatal"])
        return self._failure

    def _died(self) -> BackendError:
        """No worker said why: explain it by the end of their standard error."""
        if self._log.closed:
            return BackendError("the engine has been closed", where=self._engine, remedy="load it again")
        text = self._last_words(_LOG_BYTES)
        known = explain(text)
        return BackendError(
            "an engine process ended unexpectedly" if known is None else known.what,
            where=self._engine,
            why=text[-_LAST_WORDS:] or f"exit code {self._child.returncode}, nothing was said",
            remedy="run `trtllm-redrafter doctor`" if known is None else known.remedy,
        )

    def _last_words(self, limit: int = _LAST_WORDS) -> str:
        """The end of what the workers and those who started them wrote to standard error."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - limit))
        return self._log.read().decode("utf-8", errors="replace").strip()


def _said(error: dict[str, Any]) -> BackendError:
    """A worker's own error."""
    problems = [Problem(**problem) for problem in error["problems"]]
    return BackendError(
        error["what"], where=error["where"], why=error["why"], remedy=error["remedy"], problems=problems
    )


def _message(line: str) -> dict[str, Any] | None:
    """A worker's message; None for what others print on the same pipe."""
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and _KINDS & value.keys() else None
