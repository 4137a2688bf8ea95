"""An engine in a process of its own, driven over standard input: one rank of it, or the LLM API's holder of them all.

    mpirun -n 4 python -m trtllm_redrafter.backends.tensorrt_llm.worker ENGINE --api executor
    python -m trtllm_redrafter.backends.tensorrt_llm.worker ENGINE --api llm --kv-cache-tokens 4096

Messages are JSON lines. To the worker: {"op": "submit", ...}, {"op": "cancel", "number": 3}; end of input ends it. From
it: {"ready": true}, {"event": {...}}, {"fatal": {...}}. Whatever libraries print goes to standard error instead.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest, EngineClient
from trtllm_redrafter.backends.tensorrt_llm.engine_dir import EngineDirectory, read_engine
from trtllm_redrafter.backends.tensorrt_llm.failures import run_error
from trtllm_redrafter.errors import RedrafterError

_POLL_SECONDS = 0.02
_CLOSE_SECONDS = 10.0
Operations = queue.SimpleQueue[dict[str, Any] | None]


class RankClient(EngineClient, Protocol):
    """A client that knows whether its process is the one to take requests."""

    @property
    def leads(self) -> bool: ...


def main(arguments: list[str]) -> int:
    """Exit code; errors while loading are sent to the parent as a `fatal` message."""
    out = _take_stdout()
    try:
        folder, _, api, *cache = arguments
        tokens = int(cache[1]) if cache else None
        client = _client(read_engine(Path(folder), verify_hashes=False), api, tokens)
    except RedrafterError as error:
        _send(out, {"fatal": error.as_dict()})
        return error.exit_code
    try:
        if client.leads:
            _send(out, {"ready": True})
            _serve(client, out)
    except BrokenPipeError:
        _abandon(client, 1)  # the parent is gone
    except Exception as error:  # noqa: BLE001 - said before closing, which may wait for ranks that hang
        failure = error if isinstance(error, RedrafterError) else run_error(error)
        _send(out, {"fatal": failure.as_dict()})
        _abandon(client, failure.exit_code)
    client.close()  # on other ranks this waits for the leader to end
    return 0


def _abandon(client: RankClient, code: int) -> NoReturn:
    """Exit now, closed or not: ranks that have failed may wait for each other forever and keep their GPUs."""
    closing = threading.Thread(target=client.close, daemon=True)
    closing.start()
    closing.join(_CLOSE_SECONDS)
    sys.stderr.flush()
    os._exit(code)


def _client(engine: EngineDirectory, api: str, kv_cache_tokens: int | None) -> RankClient:
    if api == "llm":
        from trtllm_redrafter.backends.tensorrt_llm.llm_client import LlmClient

        return LlmClient(
            engine.path, runtime=engine.runtime, tp_size=engine.world_size, kv_cache_tokens=kv_cache_tokens
        )
    from trtllm_redrafter.backends.tensorrt_llm.executor_client import ExecutorClient

    return ExecutorClient(
        engine.path,
        has_drafter=engine.draft_shape is not None,
        runtime=engine.runtime,
        device=None,
        kv_cache_tokens=kv_cache_tokens,
    )


def _take_stdout() -> IO[str]:
    """Reserve the pipe for messages: for everything else, file descriptor 1 becomes standard error."""
    sys.stdout.flush()
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return ours


def _send(out: IO[str], message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _serve(client: RankClient, out: IO[str]) -> None:
    operations: Operations = queue.SimpleQueue()
    threading.Thread(target=_read, args=(operations,), daemon=True).start()
    running: set[int] = set()
    while True:
        operation = _next(operations, wait=not running)
        while operation is not None:
            if operation.get("op") == "end":
                return
            _apply(client, operation, running, out)
            operation = _next(operations, wait=False)
        for event in client.poll(_POLL_SECONDS) if running else []:
            if event.final:
                running.discard(event.number)
            _send(out, {"event": event.as_dict()})


def _read(operations: Operations) -> None:
    """The end of the input ends the worker, whatever caused it: a parent that was killed may leave half a line."""
    try:
        for line in sys.stdin:
            operations.put(json.loads(line))
    except ValueError:
        print("the request pipe broke off within a message", file=sys.stderr)
    finally:
        operations.put({"op": "end"})


def _next(operations: Operations, *, wait: bool) -> dict[str, Any] | None:
    try:
        return operations.get(block=wait)
    except queue.Empty:
        return None


def _apply(client: RankClient, operation: dict[str, Any], running: set[int], out: IO[str]) -> None:
    if operation["op"] == "cancel":
        client.cancel(int(operation["number"]))
        return
    request = ClientRequest(**operation["request"])
    try:
        client.submit(request)
    except Exception as error:  # noqa: BLE001 - the executor's refusal of one request must not end the others
        event = {"number": request.number, "token_ids": [], "final": True, "error": str(error)}
        _send(out, {"event": event})
        return
    running.add(request.number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
