"""The engine through TensorRT-LLM's LLM API, for releases whose bindings are at fault: `tensorrt_llm.api: llm`.

Token ids go in and come out: the API's tokenizer stays off, so a missing or damaged one cannot matter, and stop strings
are found by the same code as everywhere. An event loop runs in a thread of its own for as long as the client lives. It
has to: the API chooses its queues by whether a loop is running when a request is made, and drops responses into them
from its own threads only while that loop runs. Every other call is made in that thread, since the API's sockets to its
worker processes must not be used by several.

It always lives in a worker process, with one GPU too (`remote_client`): the API starts processes by MPI, which must not
happen in a command line, server or notebook. Names beyond the contract are in tests/data/trtllm/llm_api.json, with
their sources. Not verified on a GPU: that a response is one decoding step here as well, and that `decoding_iter` and
the speculative counters are passed on by the API's own processes. Without them, steps are counted by responses.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest, Event
from trtllm_redrafter.backends.tensorrt_llm.counting import drafted_tokens
from trtllm_redrafter.backends.tensorrt_llm.failures import import_library, load_error
from trtllm_redrafter.backends.tensorrt_llm.options import RuntimeOptions
from trtllm_redrafter.errors import BackendError

ENGINE_API = "tensorrt_llm._tensorrt_engine"
"""Has the LLM class for engines; the one at the package's top is for the PyTorch backend."""

LLM_API = "tensorrt_llm.llmapi"
_REMEDY = (
    "run `trtllm-redrafter doctor`, and build the engine again on this host; "
    "if the LLM API of this release is at fault, use tensorrt_llm.api: executor"
)
_NO_TOKEN = -1
"""Used as an end token: none. The API insists on a number when it has no tokenizer to take one from."""

_FINISH = {"length": "length", "timeout": "timed_out", "cancelled": "cancelled"}
_CLOSE_SECONDS = 10.0


class LlmClient:
    """One LLM object, for one GPU or several."""

    leads = True
    """The API's other ranks are processes of its own, not workers of ours."""

    def __init__(
        self, engine: Path, *, runtime: RuntimeOptions, tp_size: int, kv_cache_tokens: int | None = None
    ) -> None:
        self._api = import_library(LLM_API)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._results: dict[int, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._engine = engine
        self._closed = False
        self._stopped = threading.Event()
        llm_class = import_library(ENGINE_API).LLM
        try:
            self._llm = llm_class(
                str(engine),
                skip_tokenizer_init=True,
                tensor_parallel_size=tp_size,
                kv_cache_config=self._api.KvCacheConfig(
                    enable_block_reuse=runtime.block_reuse,
                    free_gpu_memory_fraction=runtime.kv_cache_fraction,
                    max_tokens=kv_cache_tokens,
                ),
                extended_runtime_perf_knob_config=self._api.ExtendedRuntimePerfKnobConfig(
                    multi_block_mode=runtime.multi_block_mode
                ),
            )
        except Exception as error:  # pydantic, MPI and C++ each raise their own
            raise load_error(engine, error, _REMEDY) from error
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="llm-api", daemon=True)
        self._thread.start()

    def submit(self, request: ClientRequest) -> None:
        """Raises what the API raises when it refuses a request."""
        if self._closed:
            raise BackendError("the engine has been closed", where=self._engine, remedy="load it again")
        asyncio.run_coroutine_threadsafe(self._start(request), self._loop).result()

    def cancel(self, number: int) -> None:
        if not self._closed:
            self._loop.call_soon_threadsafe(self._abort, number)

    def poll(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        try:
            events.append(self._events.get(timeout=timeout))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def close(self) -> None:
        """The loop goes last: threads of the API hand responses to it until they have ended."""
        if self._closed:
            return
        self._closed = True
        try:
            self._loop.call_soon_threadsafe(self._stop)
            self._stopped.wait(_CLOSE_SECONDS)
        finally:
            self._llm.shutdown()  # ends the ranks, whatever became of the requests
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)

    def _run_loop(self) -> None:
        """The loop's thread, which also closes it: a call that blocks the loop may keep it running after `close`."""
        self._loop.run_forever()
        self._loop.close()

    async def _start(self, request: ClientRequest) -> None:
        result = self._llm.generate_async(
            request.token_ids, sampling_params=self._sampling_params(request), streaming=True
        )
        self._results[request.number] = result
        task = asyncio.create_task(self._follow(request.number, result))
        self._tasks.add(task)  # the loop itself keeps no strong reference
        task.add_done_callback(self._tasks.discard)

    def _sampling_params(self, request: ClientRequest) -> Any:
        """End tokens are kept in the output, as the bindings do; the runner decides what belongs to the text."""
        end_less = request.end_id is None
        return self._api.SamplingParams(
            end_id=_NO_TOKEN if end_less else request.end_id,
            pad_id=0 if end_less else request.end_id,  # any token: sequences are packed, nothing is padded
            ignore_eos=end_less,
            max_tokens=request.max_tokens,
            stop_token_ids=[token for (token,) in request.stop_words] or None,
            include_stop_str_in_output=True,
            detokenize=False,
            return_perf_metrics=True,
            **request.sampling,
        )

    async def _follow(self, number: int, result: Any) -> None:
        """Every response of one request becomes an event; the last one is final, or says what went wrong."""
        taken, ended = 0, False
        try:
            async for step in result:
                event = _event(number, step, taken)
                taken, ended = taken + len(event.token_ids), event.final
                self._events.put(event)
            if not ended:
                self._events.put(Event(number, final=True, error="the LLM API ended the request without a result"))
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this request
            self._events.put(Event(number, final=True, error=f"{type(error).__name__}: {error}"))
        finally:
            self._results.pop(number, None)

    def _abort(self, number: int) -> None:
        result = self._results.get(number)
        if result is not None:
            result.abort()

    def _stop(self) -> None:
        """Cancel all requests. Not a coroutine, which a loop that has no time left for it would never await."""
        for task in self._tasks:
            task.cancel()
        ended = asyncio.gather(*self._tasks, return_exceptions=True)
        ended.add_done_callback(lambda _: self._stopped.set())


def _event(number: int, step: Any, taken: int) -> Event:
    """The API collects a request's tokens; what is new is counted here."""
    output, final = step.outputs[0], bool(step.finished)
    iterations = getattr(step, "decoding_iter", None)
    return Event(
        number=number,
        token_ids=tuple(int(token) for token in output.token_ids[taken:]),
        final=final,
        finish=_finish(output) if final else None,
        decoding_iter=int(iterations) if iterations else None,
        drafted_tokens=drafted_tokens(output) if final else None,
    )


def _finish(output: Any) -> str | None:
    """In the bindings' words. `stop` is both an end token and a stop word there; the latter names its reason."""
    reason = output.finish_reason
    if reason == "stop":
        return "end_id" if output.stop_reason is None else "stop_words"
    return _FINISH.get(reason)
