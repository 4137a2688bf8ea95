"""`tensorrt_llm.bindings.executor` as documented: signatures from the contract, behaviour from its prose.

Every class is made from the parameter list in trtllm_api.json, so a call with a parameter that is not documented is a
TypeError here. The executor "generates" by a fixed rule, in steps of varying length, and counts as the real one does:
the prefill is an iteration, drafted tokens are path lengths, and the end token is cut off (the decoder of explicit
draft tokens sets the length to its position; stop words stay). `STANDIN_RUN` makes it differ or fail: load-oom, error,
response-error, merge, pairs (two steps in a response), keep-end, overrun (tokens behind the end), none (no response is
None), no-logits, poll-error (and then `shutdown` waits forever), die, lost-rank (rank 1 dies while rank 0 waits).
"""

from __future__ import annotations

import inspect
import json
import os
import time
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONTRACT: dict[str, Any] = json.loads(Path(os.environ["STANDIN_CONTRACT"], "trtllm_api.json").read_text())
PREFIX = "tensorrt_llm.bindings.executor."


def signature(parameters: list[str]) -> inspect.Signature:
    """`["a", "*", "b=1"]` → (a, *, b=1)."""
    found, kind = [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for text in parameters:
        if text == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        name, equals, _ = text.partition("=")
        default = None if equals else inspect.Parameter.empty
        found.append(inspect.Parameter(name.strip(), kind, default=default))
    return inspect.Signature(found)


def documented(name: str) -> type:
    """A class that keeps what it was given, if the documentation knows it."""
    accepted = signature(CONTRACT[PREFIX + name])

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = accepted.bind(*args, **kwargs)
        self.given = dict(bound.arguments)
        bound.apply_defaults()
        for key, value in bound.arguments.items():
            setattr(self, key, value)

    return type(name, (), {"__init__": __init__, "__signature__": accepted})


KvCacheConfig = documented("KvCacheConfig")
DecodingConfig = documented("DecodingConfig")
ExtendedRuntimePerfKnobConfig = documented("ExtendedRuntimePerfKnobConfig")
ParallelConfig = documented("ParallelConfig")
SamplingConfig = documented("SamplingConfig")
OutputConfig = documented("OutputConfig")
Request = documented("Request")
ExecutorConfig = documented("ExecutorConfig")

ModelType = Enum("ModelType", CONTRACT[PREFIX + "ModelType"])  # type: ignore[misc]
DecodingMode = SimpleNamespace(
    **{name.removesuffix("()"): (lambda n=name: n) for name in CONTRACT[PREFIX + "DecodingMode"]}
)
FinishReason = Enum("FinishReason", ["NOT_FINISHED", "END_ID", "STOP_WORDS", "LENGTH", "TIMED_OUT", "CANCELLED"])


def next_token(token: int, vocab_size: int) -> int:
    """The stand-in's greedy continuation."""
    return (5 * token + 7) % vocab_size


def meet(rank: int, size: int) -> None:
    """As MPI: nobody goes on before all ranks are there. Each leaves its process id for the test."""
    if record := os.environ.get("STANDIN_RANKS"):
        Path(record, f"rank{rank}").write_text(str(os.getpid()))
        while len(list(Path(record).glob("rank*"))) < size:
            time.sleep(0.01)


@dataclass
class Running:
    request: Any
    tokens: list[int] = field(default_factory=list)
    pending: list[list[int]] = field(default_factory=list)
    iterations: int = 0
    accepted: int = 0
    drafted: int = 0
    cancelled: bool = False


TAKEN: dict[int, float] = {}
"""What engines of this process hold of the GPU, by a number of their own."""


def take_memory(executor: object, config: Any) -> None:
    """Weights, then the KV cache out of what is free; both go with the object, not when it is shut down.

    `STANDIN_MEMORY` is the GPU's size, an engine's weights and the tokens that a unit of memory holds.
    """
    if "STANDIN_MEMORY" not in os.environ:
        return
    total, weights, tokens = map(float, os.environ["STANDIN_MEMORY"].split(","))
    free = total - sum(TAKEN.values()) - weights
    if free <= 0:
        raise RuntimeError("[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)")
    cache = config.free_gpu_memory_fraction * free
    if config.max_tokens is not None:
        cache = min(cache, config.max_tokens / tokens)
    TAKEN[id(executor)] = weights + cache
    weakref.finalize(executor, TAKEN.pop, id(executor))


class Executor:
    """Takes requests, answers with one response per step."""

    def __init__(self, model_path: str, model_type: Any, executor_config: Any) -> None:
        assert model_type is ModelType.DECODER_ONLY and isinstance(executor_config, ExecutorConfig)
        assert executor_config.max_beam_width == 1
        config = json.loads(Path(model_path, "config.json").read_text())
        self._how = os.environ.get("STANDIN_RUN", "")
        self._gathers = bool(executor_config.gather_generation_logits)
        pretrained = config["pretrained_config"]
        self._rank, size = self._place()
        if size != pretrained.get("mapping", {}).get("world_size", 1):
            raise RuntimeError("world size differs from the engine's")
        assert Path(model_path, f"rank{self._rank}.engine").is_file()
        meet(self._rank, size)
        print("a library's own words on standard output", flush=True)
        if self._how == "load-oom":
            raise RuntimeError("[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)")
        if self._how == "lost-rank":
            if self._rank == 1:
                os._exit(9)
            time.sleep(600)
        take_memory(self, executor_config.kv_cache_config)
        self._vocab = pretrained["vocab_size"]
        self._draft_len = pretrained.get("redrafter_draft_len_per_beam", 0)
        if self._draft_len:
            assert executor_config.decoding_config.decoding_mode == "ExplicitDraftTokens()"
        self._running: dict[int, Running] = {}
        self._next_id = 100
        self._torch: Any = None
        self._polls = 0

    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks, as Open MPI tells them."""
        return int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")), int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))

    def can_enqueue_requests(self) -> bool:
        return self._rank == 0

    def enqueue_request(self, request: Any) -> int:
        assert isinstance(request, Request) and request.sampling_config.beam_width == 1
        assert request.streaming or (request.output_config.return_generation_logits and self._gathers)
        if self._how == "error" and request.input_token_ids[0] == 9:
            raise RuntimeError("prompt is refused")
        self._next_id += 1
        self._running[self._next_id] = Running(request)
        return self._next_id

    def cancel_request(self, id: int) -> None:
        if id in self._running:
            self._running[id].cancelled = True

    def await_responses(self, timeout: timedelta) -> list[Any]:
        assert isinstance(timeout, timedelta)
        time.sleep(0.001)
        if self._how == "die" and self._running:
            os._exit(3)
        if self._how == "poll-error" and self._running:
            raise RuntimeError("[TensorRT-LLM][ERROR] CUDA runtime error in cudaEventSynchronize: illegal access")
        self._polls += 1
        if self._how == "none" and self._polls % 2:
            return None  # type: ignore[return-value]
        return [response for id in list(self._running) if (response := self._step(id)) is not None]

    def shutdown(self) -> None:
        if self._how == "poll-error":
            time.sleep(600)
        self._running.clear()

    def _step(self, id: int) -> Any:
        running = self._running[id]
        if self._how == "response-error":
            del self._running[id]
            return SimpleNamespace(request_id=id, has_error=lambda: True, error_msg="Error: CUDA out of memory")
        running.iterations += 1
        new, reason = self._generate(running)
        final = reason is not FinishReason.NOT_FINISHED
        if not final and (self._how == "merge" or (self._how == "pairs" and not running.pending)):
            running.pending.append(new)
            return None
        new = [token for part in running.pending for token in part] + new
        running.pending.clear()
        if final:
            del self._running[id]
        counts = SimpleNamespace(
            acceptance_rate=0.0, total_accepted_draft_tokens=running.accepted, total_draft_tokens=running.drafted
        )
        metrics = (
            SimpleNamespace(speculative_decoding=counts) if running.request.output_config.return_perf_metrics else None
        )
        result = SimpleNamespace(
            is_final=final,
            output_token_ids=[new],
            finish_reasons=[reason],
            decoding_iter=running.iterations,
            avg_decoded_tokens_per_iter=len(running.tokens) / running.iterations,
            request_perf_metrics=metrics,
            generation_logits=self._logits(running),
        )
        return SimpleNamespace(request_id=id, has_error=lambda: False, error_msg="", result=result)

    def _logits(self, running: Running) -> Any:
        """[beams, tokens, V] of a prompt's last token, from the torch engine that `STANDIN_LOGITS` names."""
        request = running.request
        if not request.output_config.return_generation_logits or self._how == "no-logits":
            return None
        if running.iterations > 1 and self._draft_len:
            raise RuntimeError("Only speculative decoding with external draft tokens supports generation logits")
        if self._torch is None:
            from trtllm_redrafter.backends.torch.backend import TorchBackend

            engine = Path(os.environ["STANDIN_LOGITS"])
            self._torch = TorchBackend().load(engine, device="cpu", verify_hashes=False)
        return self._torch.teacher_forced(request.input_token_ids, [0]).logits.unsqueeze(0)

    def _generate(self, running: Running) -> tuple[list[int], Any]:
        """One iteration: the prefill emits one token, later ones between 1 and draft length + 1."""
        request, new = running.request, []
        if running.cancelled:
            return [], FinishReason.CANCELLED
        count = 1 if running.iterations == 1 else 1 + (running.iterations % (self._draft_len + 1))
        stops = {words[0] for words in request.stop_words or []}
        reason = FinishReason.NOT_FINISHED
        for _ in range(count):
            token = next_token((running.tokens or request.input_token_ids)[-1], self._vocab)
            running.tokens.append(token)
            new.append(token)
            if reason is not FinishReason.NOT_FINISHED:
                continue
            if token == request.end_id:
                reason = FinishReason.END_ID
            elif token in stops:
                reason = FinishReason.STOP_WORDS
            elif len(running.tokens) >= request.max_tokens:
                reason = FinishReason.LENGTH
            if reason is not FinishReason.NOT_FINISHED and self._how != "overrun":
                break
        if reason is FinishReason.END_ID and self._how not in ("keep-end", "overrun"):
            new = new[: new.index(request.end_id)]
        if running.iterations > 1:
            running.accepted += len(new) - 1
            running.drafted += self._draft_len
        return new, reason
