"""A function as a CUDA graph: captured once, then replayed with other integers in the same input buffer.

    graph = CapturedGraph(len(values), device)
    graph.fill(values)
    outputs = graph.capture(lambda: compute(graph.input), pool)
    graph.fill(others)
    graph.replay()              # overwrites `outputs`

Everything runs on the device's current stream. Streams, events, captures and Triton's launches use the current device,
which `on_device` sets to that of the tensors.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

_WARM_UPS = 2

_ONE_AT_A_TIME = threading.Lock()
"""CUDA captures one graph at a time in a process."""


def on_device(device: torch.device) -> Any:
    """`with on_device(device):` makes a GPU the current device; does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _side_stream(index: int) -> Any:
    """One stream for all warm-ups and captures on a GPU, since libraries keep megabytes of workspace per stream."""
    return torch.cuda.Stream(device=index)  # type: ignore[no-untyped-call]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from freeing reference cycles: the graphs of a model in one cannot be freed during a capture."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class CapturedGraph:
    """A captured function of one buffer of integers, and of whatever other memory it reads."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()
        self.input = torch.zeros(size, dtype=torch.int64, device=device)

    def fill(self, values: Sequence[int]) -> None:
        self._copied.synchronize()  # the last copy may still be reading the host's buffer
        self._host[: len(values)] = torch.tensor(values, dtype=torch.int64)
        self.input.copy_(self._host, non_blocking=True)
        self._copied.record()

    def capture(self, function: Callable[[], Any], pool: Any) -> Any:
        """Return the function's outputs, which each replay overwrites. Fill the input first: warm-ups run on it.

        Graphs of one pool share memory for everything but outputs, and an output may be in memory that an older graph
        uses: read it before another graph of the pool is replayed.
        """
        device = self.input.device
        main, side = torch.cuda.current_stream(device), _side_stream(device.index)
        with _ONE_AT_A_TIME, torch.cuda.stream(main):  # restores the stream if a capture fails
            side.wait_stream(main)
            try:
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UPS):  # libraries choose kernels and allocate, which a capture must not
                        function()
            finally:
                main.wait_stream(side)
            # Thread-local, so that other threads may keep using the GPU.
            with _no_collection(), torch.cuda.graph(
                self._graph, pool=pool, stream=side, capture_error_mode="thread_local"
            ):  # fmt: skip
                return function()

    def replay(self) -> None:
        self._graph.replay()
