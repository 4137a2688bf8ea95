"""`tensorrt_llm.llmapi` and `tensorrt_llm._tensorrt_engine` as documented, over the stand-in executor.

Signatures are from trtllm_api.json and llm_api.json, so a parameter or attribute that is not documented fails here.
Ranks are processes: spawned by the LLM object, or waiting already where trtllm-llmapi-launch started them. Only the way
with an event loop is here, since that is the one the client goes.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.standins import bindings

LLM_CONTRACT: dict[str, Any] = json.loads(Path(os.environ["STANDIN_CONTRACT"], "llm_api.json").read_text())
LLM_ARGS = {field.partition("=")[0].partition(" ")[0] for field in
            bindings.CONTRACT["tensorrt_llm.llmapi.TrtLlmArgs (fields relevant; non-exhaustive)"]}  # fmt: skip
RANK = "import os, sys; from tests.standins.bindings import meet; meet({rank}, {size}); sys.stdin.read()"


def keep(self: Any, accepted: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    bound = accepted.bind(*args, **kwargs)
    self.given = dict(bound.arguments)
    bound.apply_defaults()
    for key, value in bound.arguments.items():
        setattr(self, key, value)


class KvCacheConfig:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        keep(self, bindings.signature(LLM_CONTRACT["tensorrt_llm.llmapi.KvCacheConfig"]["parameters"]), args, kwargs)


class ExtendedRuntimePerfKnobConfig:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = "tensorrt_llm.llmapi.ExtendedRuntimePerfKnobConfig"
        keep(self, bindings.signature(LLM_CONTRACT[name]["parameters"]), args, kwargs)


class SamplingParams:
    """Keyword-only, as the original; values that are not passed are None or off."""

    def __init__(self, **kwargs: Any) -> None:
        keep(self, bindings.signature(bindings.CONTRACT["tensorrt_llm.SamplingParams"]), (), kwargs)


class RequestError(RuntimeError):
    pass


class CompletionOutput:
    """Has the documented attributes and no others."""

    __slots__ = tuple(name.partition("=")[0] for name in bindings.CONTRACT["tensorrt_llm.llmapi.CompletionOutput"])

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, None)
        self.index, self.text, self.token_ids = 0, "", []


class RequestOutput:
    """One request: iterating over it takes one response at a time."""

    __slots__ = (
        *LLM_CONTRACT["tensorrt_llm.llmapi.RequestOutput"]["attributes"],
        "_aborted",
        "_llm",
        "_params",
        "_queue",
    )

    def __init__(self, llm: LLM, request_id: int, prompt: list[int], params: Any) -> None:
        self._llm, self._params, self._aborted = llm, params, False
        self.request_id, self.prompt_token_ids = request_id, prompt
        self.outputs, self.finished, self.decoding_iter = [CompletionOutput()], False, 0
        self._queue = LoopQueue()

    def abort(self) -> None:
        self._llm._call("cancel_request", self.request_id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        response = await self._queue.queue.get()
        if response.has_error():
            raise RequestError(response.error_msg)
        self._handle(response.result)
        return self

    def _handle(self, result: Any) -> None:
        output, reason = self.outputs[0], result.finish_reasons[0].name
        output.token_ids = [*output.token_ids, *result.output_token_ids[0]]
        output.request_perf_metrics = result.request_perf_metrics
        self.finished = result.is_final
        if os.environ.get("STANDIN_RUN") != "no-iterations":
            self.decoding_iter = result.decoding_iter
        if not self.finished:
            return
        output.finish_reason = {"END_ID": "stop", "STOP_WORDS": "stop", "TIMED_OUT": "timeout"}.get(
            reason, reason.lower()
        )
        if reason == "STOP_WORDS":
            output.stop_reason = output.token_ids[-1]
            if not self._params.include_stop_str_in_output:
                output.token_ids = output.token_ids[:-1]


class LoopQueue:
    """Filled from the API's threads; belongs to the loop that runs where it is made."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, item: Any) -> None:
        assert self.loop.is_running(), "responses come while the event loop does not run"
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class EngineRank(bindings.Executor):
    """The executor in the LLM API's own hands: its rank is not told by MPI's variables."""

    size = 1

    def _place(self) -> tuple[int, int]:
        return 0, self.size


class LLM:
    """Constructor and methods of the documented signatures."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        known = [p for p in bindings.CONTRACT["tensorrt_llm._tensorrt_engine.LLM"] if not p.startswith("**")]
        named = {name.partition("=")[0] for name in known}
        for name in kwargs.keys() - named - LLM_ARGS:
            raise ValueError(f"LLM got invalid argument: {name}")
        bound = bindings.signature(known).bind(*args, **{k: v for k, v in kwargs.items() if k in named})
        self._more = {k: v for k, v in kwargs.items() if k not in named}
        self.skip_tokenizer_init = bound.arguments.get("skip_tokenizer_init", False)
        self._check_configs()
        model = Path(bound.arguments["model"])
        size = (
            json.loads((model / "config.json").read_text())["pretrained_config"].get("mapping", {}).get("world_size", 1)
        )
        asked = bound.arguments.get("tensor_parallel_size", 1)
        if asked not in (1, size):
            raise ValueError(f"tp_size {asked} is not consistent with the engine's tp_size {size}")
        self._ranks = self._spawn(size)
        self._engine = type("Rank", (EngineRank,), {"size": size})(
            str(model), bindings.ModelType.DECODER_ONLY, self._executor_config()
        )
        self._lock, self._open = threading.Lock(), True
        self._results: dict[int, RequestOutput] = {}
        self._dispatcher = threading.Thread(target=self._dispatch, daemon=True)
        self._dispatcher.start()

    def _check_configs(self) -> None:
        kv, knobs = self._more.get("kv_cache_config"), self._more.get("extended_runtime_perf_knob_config")
        assert kv is None or isinstance(kv, KvCacheConfig)
        assert knobs is None or isinstance(knobs, ExtendedRuntimePerfKnobConfig)
        if record := os.environ.get("STANDIN_LLM_RECORD"):
            seen = {"kv": vars(kv)["given"] if kv else None, "knobs": vars(knobs)["given"] if knobs else None,
                    "environment": {k: os.environ.get(k) for k in ("CUDA_VISIBLE_DEVICES", "SLURM_PROCID",
                                    "TLLM_WORKER_USE_SINGLE_PROCESS", "TLLM_SPAWN_PROXY_PROCESS")}}  # fmt: skip
            Path(record).write_text(json.dumps(seen))

    def _spawn(self, size: int) -> list[subprocess.Popen[bytes]]:
        """Ranks beyond this process; under the launcher they are there."""
        if size == 1:
            assert os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1", "MPI_ERR_SPAWN: could not spawn processes"
            return []
        if os.environ.get("TLLM_SPAWN_PROXY_PROCESS") == "1":
            return []
        return [
            subprocess.Popen([sys.executable, "-c", RANK.format(rank=rank, size=size)], stdin=subprocess.PIPE)
            for rank in range(1, size)
        ]

    def _executor_config(self) -> Any:
        """Decoding mode: the executor sets it by itself for an engine with a drafter."""
        mode = bindings.DecodingConfig(decoding_mode=bindings.DecodingMode.ExplicitDraftTokens())
        return bindings.ExecutorConfig(decoding_config=mode, max_beam_width=1)

    def generate_async(self, *args: Any, **kwargs: Any) -> RequestOutput:
        bound = bindings.signature(bindings.CONTRACT["tensorrt_llm.llmapi.LLM.generate_async"]).bind(*args, **kwargs)
        bound.apply_defaults()
        prompt, params = bound.arguments["inputs"], bound.arguments["sampling_params"]
        assert isinstance(prompt, list) and bound.arguments["streaming"] is True
        if params.end_id is None:
            assert self.skip_tokenizer_init
            raise ValueError("tokenizer is required to reset end_id if it is None")
        made = bindings.Request(
            input_token_ids=prompt, max_tokens=params.max_tokens, streaming=True,
            sampling_config=bindings.SamplingConfig(
                1, top_k=params.top_k, top_p=params.top_p, temperature=params.temperature, seed=params.seed
            ),
            output_config=bindings.OutputConfig(return_perf_metrics=bool(params.return_perf_metrics)),
            end_id=-1 if params.ignore_eos else params.end_id, pad_id=params.pad_id,
            stop_words=[] if params.ignore_eos else [[token] for token in params.stop_token_ids or []],
        )  # fmt: skip
        with self._lock:
            request_id = self._engine.enqueue_request(made)
            result = RequestOutput(self, request_id, prompt, params)
            self._results[request_id] = result
        return result

    def _call(self, name: str, *args: Any) -> Any:
        with self._lock:
            return getattr(self._engine, name)(*args)

    def _dispatch(self) -> None:
        while self._open:
            for response in self._call("await_responses", timedelta(seconds=1)):
                self._results[response.request_id]._queue.put(response)
            threading.Event().wait(0.001)

    def shutdown(self) -> None:
        self._open = False
        self._dispatcher.join()
        self._engine.shutdown()
        for rank in self._ranks:
            rank.communicate()
        if stop := os.environ.get("STANDIN_LEADER"):
            Path(stop).write_text("stop")
