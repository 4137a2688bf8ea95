"""What a runner needs of an engine process, in plain values that can cross a pipe.

Three clients implement it: `ExecutorClient` and `LlmClient` hold the engine, each through another interface of
TensorRT-LLM; `RemoteClient` runs one of them in worker processes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class ClientRequest:
    """One request as the executor takes it. `number` is ours, not the executor's.

    `sampling` has TensorRT-LLM's names, which the executor's SamplingConfig and the LLM API's SamplingParams share.
    """

    number: int
    token_ids: list[int]
    max_tokens: int
    end_id: int | None
    stop_words: list[list[int]]
    sampling: dict[str, float | int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Event:
    """What one response of the executor added to a request.

    `decoding_iter` counts its iterations so far, the prefill included. `drafted_tokens` comes with the last event where
    the release reports it, counted as in `SpecDecodingStats`. `finish` is in the executor's words: end_id, stop_words,
    length, timed_out, cancelled.
    """

    number: int
    token_ids: tuple[int, ...] = ()
    final: bool = False
    finish: str | None = None
    decoding_iter: int | None = None
    drafted_tokens: int | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Event:
        return cls(**{**values, "token_ids": tuple(values["token_ids"])})


class EngineClient(Protocol):
    """An engine being executed somewhere."""

    def submit(self, request: ClientRequest) -> None: ...

    def cancel(self, number: int) -> None: ...

    def poll(self, timeout: float) -> list[Event]:
        """Events received so far; waits up to `timeout` seconds for the first."""
        ...

    def close(self) -> None: ...
