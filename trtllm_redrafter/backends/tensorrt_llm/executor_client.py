"""The engine in this process, through the executor's Python bindings.

The most direct way: each response is one decoding step as the C++ executor reports it, with its own counters.
`llm_client` is the alternative. A test checks every call made here against the documented signatures.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest, Event
from trtllm_redrafter.backends.tensorrt_llm.counting import drafted_tokens
from trtllm_redrafter.backends.tensorrt_llm.failures import import_library, load_error, run_error
from trtllm_redrafter.backends.tensorrt_llm.options import RuntimeOptions
from trtllm_redrafter.errors import BackendError

BINDINGS = "tensorrt_llm.bindings.executor"
_REMEDY = (
    "run `trtllm-redrafter doctor`, and build the engine again on this host; "
    "if the bindings of this release are at fault, use tensorrt_llm.api: llm"
)


class ExecutorClient:
    """One executor. Under MPI only the leading rank takes requests; the other ranks serve it from their own threads."""

    def __init__(
        self,
        engine: Path,
        *,
        has_drafter: bool,
        runtime: RuntimeOptions,
        device: int | None,
        kv_cache_tokens: int | None = None,
    ) -> None:
        self._engine = engine
        self._bindings = import_library(BINDINGS)
        self._numbers: dict[int, int] = {}
        self._ids: dict[int, int] = {}
        try:
            config = self._config(has_drafter, runtime, device, kv_cache_tokens)
            self._loaded = self._bindings.Executor(str(engine), self._bindings.ModelType.DECODER_ONLY, config)
        except Exception as error:  # C++ raises RuntimeError and others: the engine did not load
            raise load_error(engine, error, _REMEDY) from error

    @property
    def _executor(self) -> Any:
        if self._loaded is None:
            raise BackendError("the engine has been closed", where=self._engine, remedy="load it again")
        return self._loaded

    def _config(
        self, has_drafter: bool, runtime: RuntimeOptions, device: int | None, kv_cache_tokens: int | None
    ) -> Any:
        b = self._bindings
        more: dict[str, Any] = {}
        if has_drafter:
            more["decoding_config"] = b.DecodingConfig(decoding_mode=b.DecodingMode.ExplicitDraftTokens())
        if device is not None:
            more["parallel_config"] = b.ParallelConfig(device_ids=[device])
        return b.ExecutorConfig(
            max_beam_width=1,
            kv_cache_config=b.KvCacheConfig(
                enable_block_reuse=runtime.block_reuse,
                free_gpu_memory_fraction=runtime.kv_cache_fraction,  # of what is free now
                max_tokens=kv_cache_tokens,  # the smaller of the two applies
            ),
            extended_runtime_perf_knob_config=b.ExtendedRuntimePerfKnobConfig(
                multi_block_mode=runtime.multi_block_mode
            ),
            **more,
        )

    @property
    def leads(self) -> bool:
        """False on the other ranks of a multi-GPU engine."""
        return bool(self._executor.can_enqueue_requests())

    def submit(self, request: ClientRequest) -> None:
        b = self._bindings
        sampling = b.SamplingConfig(beam_width=1, **request.sampling)
        made = b.Request(
            input_token_ids=request.token_ids,
            max_tokens=request.max_tokens,
            streaming=True,
            sampling_config=sampling,
            output_config=b.OutputConfig(exclude_input_from_output=True, return_perf_metrics=True),
            end_id=request.end_id,
            stop_words=request.stop_words or None,
        )
        executor_id = int(self._executor.enqueue_request(made))
        self._numbers[executor_id], self._ids[request.number] = request.number, executor_id

    def cancel(self, number: int) -> None:
        if number in self._ids:
            self._executor.cancel_request(self._ids[number])

    def poll(self, timeout: float) -> list[Event]:
        """`BackendError` when the engine itself has failed: then no request will be answered any more."""
        try:
            responses = self._executor.await_responses(timedelta(seconds=timeout)) or ()
        except Exception as error:  # C++ raises RuntimeError and others
            raise run_error(error) from error
        return [event for response in responses if (event := self._event(response)) is not None]

    def close(self) -> None:
        """Shutting down ends the threads and keeps the model: its memory goes with the last reference to the object."""
        executor, self._loaded = self._loaded, None
        if executor is not None:
            executor.shutdown()

    def _event(self, response: Any) -> Event | None:
        number = self._numbers.get(int(response.request_id))
        if number is None:
            return None
        if response.has_error():
            self._forget(number)
            return Event(number, final=True, error=str(response.error_msg))
        result = response.result
        if result.is_final:
            self._forget(number)
        return Event(
            number=number,
            token_ids=tuple(int(token) for token in result.output_token_ids[0]),
            final=bool(result.is_final),
            finish=_finish(result),
            decoding_iter=int(result.decoding_iter),
            drafted_tokens=drafted_tokens(result) if result.is_final else None,
        )

    def _forget(self, number: int) -> None:
        self._numbers.pop(self._ids.pop(number))


def _finish(result: Any) -> str | None:
    """`end_id`, `stop_words`, `length`, ...; the binding's enumeration by name."""
    reasons = list(result.finish_reasons or ())
    if not result.is_final or not reasons:
        return None
    return str(getattr(reasons[0], "name", reasons[0])).lower()
