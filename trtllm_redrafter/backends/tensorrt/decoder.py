"""Sequences on a device: their state and KV cache, and the networks that move them on.

A sequence has a slot, row `slot` of every tensor here. A step runs the rows up to the last one in use; a prompt's pass
runs on its own row alone, as a batch of one.

    decoder.prompt(slot, token_ids, choices)      # Report with the first token
    decoder.step(rows, drafted, choices)          # Reports of slots 0 .. rows - 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trtllm_redrafter.backends.tensorrt.network import Sizes, cache_names
from trtllm_redrafter.backends.tensorrt.step import REPORT, STATE

PROMPT_CHUNK = 256
"""Prompt tokens per pass, at most."""


class Program(Protocol):
    """A network ready to run on a device."""

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """Read and write the tensors of these names; weights are bound once, when the program is made.

        `NAME.out` may be the memory of `NAME` for KV caches alone. Returns when the outputs can be read.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Programs:
    """Which network a pass runs: drafted or a chain, greedy or sampled; made when it is first asked for."""

    make: Callable[[bool, bool], Program]
    made: dict[tuple[bool, bool], Program]

    def get(self, *, drafted: bool, sampled: bool) -> Program:
        key = (drafted, sampled)
        if key not in self.made:
            self.made[key] = self.make(*key)
        return self.made[key]


@dataclass(frozen=True)
class Choices:
    """How the tokens of n rows are chosen; all None: greedily."""

    temperature: NDArray[np.float32]  # [n]
    top_k: NDArray[np.float32]  # [n]; 0 is off
    top_p: NDArray[np.float32]  # [n]
    uniforms: NDArray[np.float32]  # [n, P + 1], for the next outputs

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Report:
    """What a pass did for one sequence."""

    tokens: list[int]
    drafts_finite: bool
    dirty: bool
    """Not all logits were finite: clean the slot before its next pass."""


class Decoder:
    """State and KV cache of `max_batch_size` slots on one device."""

    def __init__(self, sizes: Sizes, programs: Programs, *, max_batch_size: int, device: torch.device) -> None:
        config = sizes.config
        dtype: torch.dtype = getattr(torch, config.dtype)
        self.device = str(device)
        self._device, self._sizes, self._programs = device, sizes, programs
        count, moved = max_batch_size, sizes.moved

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._state = {"root": zeros(count), "context": zeros(count, config.hidden_size, dtype=dtype),
                       "base": zeros(count), "source": zeros(count, moved)}  # fmt: skip
        self._next = {name: torch.zeros_like(tensor) for name, tensor in self._state.items()}
        self._report = zeros(count, moved + 4)
        shape = (count, config.num_key_value_heads, sizes.capacity, config.head_size)
        self._caches = {name: zeros(*shape, dtype=dtype) for name in cache_names(config)}

    @property
    def moved(self) -> int:
        """P: the longest draft."""
        return self._sizes.moved

    def prompt(self, slot: int, token_ids: Sequence[int], choices: Choices | None) -> Report:
        """Compute a prompt from position 0, chunk by chunk; the report has its first token."""
        self.release(slot)
        rows = slice(slot, slot + 1)
        active = torch.ones(1, dtype=torch.bool, device=self._device)
        for start in range(0, len(token_ids), PROMPT_CHUNK):
            chunk = torch.tensor([list(token_ids[start : start + PROMPT_CHUNK])], device=self._device)
            self._run(rows, {"tokens": chunk, "active": active}, choices, drafted=False)
        return self._reports(rows)[0]

    def step(
        self, rows: int, active: Sequence[bool], drafted: Sequence[bool] | None, choices: Choices | None
    ) -> list[Report]:
        """One pass over slots 0 .. rows - 1; `drafted` says which draft, None: no search at all."""
        taken = slice(0, rows)
        given = {"active": torch.tensor(list(active), device=self._device)}
        if drafted is None:
            given["tokens"] = self._state["root"][taken].unsqueeze(1)
        else:
            given["drafted"] = torch.tensor(list(drafted), device=self._device)
            given["root"] = self._state["root"][taken]
        self._run(taken, given, choices, drafted=drafted is not None)
        return self._reports(taken)

    def clean(self, slot: int) -> None:
        """Zero what is not committed, where NaN would reach every row through attention weights of zero."""
        base, moved = int(self._state["base"][slot]), self.moved
        source = self._state["source"][slot]
        for cache in self._caches.values():
            kept = cache[slot][:, source].clone()
            cache[slot][:, moved + base :] = 0
            cache[slot][:, base : base + moved] = kept
        self._state["source"][slot] = base + torch.arange(moved, device=self._device)

    def release(self, slot: int) -> None:
        """Nobody uses a slot any more: what steps of others write into its row lies at its beginning.

        Its text may have ended so close to the limit that another step would write behind the cache's end.
        """
        self._state["base"][slot] = 0
        self._state["source"][slot] = torch.arange(self.moved)

    def forget(self, slot: int) -> None:
        """Zero a slot, whose state too may not be finite."""
        for tensor in (*self._caches.values(), *self._state.values()):
            tensor[slot] = 0

    def close(self) -> None:
        for program in self._programs.made.values():
            program.close()
        self._programs.made.clear()
        self._caches, self._state, self._next = {}, {}, {}

    def _run(self, rows: slice, given: dict[str, Tensor], choices: Choices | None, *, drafted: bool) -> None:
        tensors = dict(given)
        for name in STATE:
            if name == "source" and not self.moved:
                continue
            tensors.setdefault(name, self._state[name][rows])
            tensors[f"{name}.out"] = self._next[name][rows]
        for name, cache in self._caches.items():
            tensors[name] = tensors[f"{name}.out"] = cache[rows]
        tensors[REPORT] = self._report[rows]
        if choices is not None:
            tensors |= {name: tensor.to(self._device) for name, tensor in choices.tensors().items()}
        self._programs.get(drafted=drafted, sampled=choices is not None).run(tensors)
        for name in STATE:
            self._state[name][rows] = self._next[name][rows]

    def _reports(self, rows: slice) -> list[Report]:
        found = []
        for *tokens, count, sound, dirty in self._report[rows].tolist():
            found.append(Report(tokens[:count], bool(sound), bool(dirty)))
        return found
