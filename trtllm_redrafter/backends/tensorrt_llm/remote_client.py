"""The engine in other processes: one per GPU, started by mpirun (or srun inside a Slurm job), spoken to over a pipe.

This process keeps its own life: it may be the command line, a server or a notebook, needs no MPI itself, and a crash of
a rank becomes an error with the worker's last words instead of the end of everything.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.tensorrt_llm.child import end_group
from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest, Event
from trtllm_redrafter.backends.tensorrt_llm.failures import explain
from trtllm_redrafter.backends.tensorrt_llm.machine import find_program
from trtllm_redrafter.errors import BackendError, Problem

WORKER = "trtllm_redrafter.backends.tensorrt_llm.worker"
_END_SECONDS = 30.0
_LAST_WORDS = 2000


def launch_command(ranks: int, environment: Mapping[str, str]) -> list[str]:
    """How to start one process per GPU here. Inside a Slurm job, its own starter knows the hosts."""
    if "SLURM_JOB_ID" in environment and find_program("srun") is not None:
        return ["srun", "--mpi=pmix", "-n", str(ranks)]
    if find_program("mpirun") is None:
        raise BackendError(
            f"the engine needs {ranks} processes and mpirun is not installed",
            remedy="apt-get install libopenmpi-dev openmpi-bin, or use the release container",
        )
    return ["mpirun", "-n", str(ranks), "--allow-run-as-root"]


class RemoteClient:
    """Workers of one engine."""

    def __init__(self, engine: Path, ranks: int) -> None:
        command = [*launch_command(ranks, os.environ), sys.executable, "-m", WORKER, str(engine)]
        self._engine = engine
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close()
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("{"):
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _await_ready(self) -> None:
        message = self._messages.get()
        if message is None:
            raise self._died()
        if "fatal" in message:
            error = message["fatal"]
            problems = [Problem(**problem) for problem in error["problems"]]
            raise BackendError(
                error["what"], where=error["where"], why=error["why"], remedy=error["remedy"], problems=problems
            )

    def submit(self, request: ClientRequest) -> None:
        self._send({"op": "submit", "request": request.as_dict()})

    def cancel(self, number: int) -> None:
        self._send({"op": "cancel", "number": number})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._died() from error

    def poll(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        deadline = time.monotonic() + timeout
        while True:
            wait = 0.0 if events else max(0.0, deadline - time.monotonic())
            try:
                message = self._messages.get(timeout=wait) if wait > 0 else self._messages.get_nowait()
            except queue.Empty:
                return events
            if message is None:
                raise self._died()
            events.append(Event.from_dict({"token_ids": [], **message["event"]}))

    def close(self) -> None:
        """Ask the workers to end; end them if they do not."""
        if self._child.stdin is not None and not self._child.stdin.closed:
            try:
                self._child.stdin.close()
                self._child.wait(_END_SECONDS if self._child.poll() is None else 0)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                pass  # what did not listen is ended below
        end_group(self._child)
        self._log.close()

    def _died(self) -> BackendError:
        self._child.poll()
        self._log.seek(0)
        text = self._log.read()
        known = explain(text)
        return BackendError(
            "an engine process ended unexpectedly" if known is None else known.what,
            where=self._engine,
            why=text[-_LAST_WORDS:].strip() or f"exit code {self._child.returncode}, nothing was said",
            remedy="run `trtllm-redrafter doctor`" if known is None else known.remedy,
        )
