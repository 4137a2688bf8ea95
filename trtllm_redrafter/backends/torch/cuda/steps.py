"""Whole decoding steps as one graph: what a step decodes follows on the device from what the last one wrote.

A step searches the drafter, merges the beams to trees, runs the base model over them, accepts, moves the accepted keys
and values, and leaves each sequence's next root and context where the next step finds them. So steps can be queued
ahead of the host, which reads what they wrote later:

    steps = DeviceSteps(executor, search)
    steps.admit(slot, root=token, base=len(prompt), context=hidden, remaining=63, drafts=True, stops=(2,))
    ahead = [steps.launch([slot], longest=len(prompt)), steps.launch([slot], longest=len(prompt) + 6)]
    ahead[0].wait()             # what the first step wrote, while the second one runs

Greedy decoding: the drawn token is the largest logit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtllm_redrafter.backends.torch.captured import CapturedGraph, on_device
from trtllm_redrafter.backends.torch.cuda.compiler import compiled, pointer
from trtllm_redrafter.backends.torch.cuda.executor import CudaExecutor, portions, power_of_two, tree_layout
from trtllm_redrafter.backends.torch.cuda.search import SearchKernel
from trtllm_redrafter.backends.torch.layout import Layout
from trtllm_redrafter.redrafter.config import DraftShape

STOPS = 8
"""End tokens that the device looks for; the host looks for all."""

_DRAFTS, _DONE = 1, 2  # of a sequence's flags
_DRAFTER_NOT_FINITE, _LOGITS_NOT_FINITE = 1, 2  # of an outcome's status
_HEADER = 3  # of `struct Outcome`, before its tokens
_RING = 4  # outcomes on the host, more than steps under way
_SHARED = 40 << 10


class Outcome(NamedTuple):
    """What one step brought a sequence."""

    tokens: list[int]
    """Written tokens, up to the first that ends the text; none for a sequence that has ended."""
    drafted_tokens: int
    """Tokens drafted along a path."""
    drafter_finite: bool
    logits_finite: bool
    """If not, nothing was written, and the next step does without drafts; the sequence has ended if this one did."""


class Pending:
    """A step under way."""

    def __init__(self, host: Tensor, event: Any, count: int) -> None:
        self._host, self._event, self._count = host, event, count

    def wait(self) -> list[Outcome]:
        """Outcomes in the order of the launch's slots."""
        self._event.synchronize()
        return [
            Outcome(
                row[_HEADER : _HEADER + row[0]],
                row[1],
                not row[2] & _DRAFTER_NOT_FINITE,
                not row[2] & _LOGITS_NOT_FINITE,
            )
            for row in self._host[: self._count].tolist()
        ]


_TREES = ("sequence", "depths", "paths", "slots", "bases", "first", "tokens", "parents", "kept")


class _Trees(ctypes.Structure):
    """`struct Trees`."""

    _fields_ = [(name, ctypes.c_void_p) for name in _TREES]


@dataclass(frozen=True)
class _Portion:
    """Sequences whose trees go through the base model together, `begin` the first of them."""

    begin: int
    layout: Layout
    packed: Tensor  # as the layout says
    parents: Tensor  # [rows] int32
    kept: Tensor  # [batch, 1 + path] int32

    def trees(self) -> _Trees:
        parts = self.layout.split(self.packed)
        named = {name: part.data_ptr() for name, part in parts.items() if name in _TREES}
        return _Trees(**named, parents=self.parents.data_ptr(), kept=self.kept.data_ptr())


@dataclass
class _Step:
    """A captured step, and the memory that it works in."""

    graph: CapturedGraph
    outcomes: Tensor  # [B, 3 + L + 1]
    portions: list[_Portion]
    order: list[int] = field(default_factory=list)
    """The slots that it was last run for."""


class DeviceSteps:
    """The steps of an executor's sequences, with the search that runs beside it or none."""

    def __init__(self, executor: CudaExecutor, search: SearchKernel | None, *, max_batch_size: int) -> None:
        self._executor, self._search = executor, search
        self.shape = DraftShape(1, 0) if search is None else search.shape
        hidden = executor.model.hidden
        self._device, self._idle = hidden.device, max_batch_size
        done = [0, 0, 0, _DONE, *[-1] * STOPS]  # of all slots, and of one more that stays so and fills batches up
        state = [done] * (max_batch_size + 1)
        with on_device(self._device):
            self._sequences = torch.tensor(state, dtype=torch.int64, device=self._device)
            self._contexts = hidden.new_zeros(max_batch_size + 1, hidden.shape[1])
            width = _HEADER + self.shape.draft_len + 1
            largest = power_of_two(max_batch_size)
            self._ring = torch.zeros(_RING, largest, width, dtype=torch.int64, pin_memory=True)
            self._events = [torch.cuda.Event() for _ in range(_RING)]  # type: ignore[no-untyped-call]
        self._launched = 0
        self._steps: dict[tuple[int, bool, int], _Step] = {}

    def admit(
        self, slot: int, *, root: int, base: int, context: Tensor, remaining: int, drafts: bool, stops: Sequence[int]
    ) -> None:
        """A slot's sequence for the steps launched from now on.

        `base` positions are committed, `root` is written but not computed, `context` [H] is the state of the last
        committed position, `remaining` tokens may be written.
        """
        known = list(stops)[:STOPS]
        state = [root, base, remaining, _DRAFTS if drafts else 0, *known, *[-1] * (STOPS - len(known))]
        self._sequences[slot].copy_(torch.tensor(state, dtype=torch.int64))
        self._contexts[slot].copy_(context)

    def context(self, slot: int) -> Tensor:
        """State [H] of the last committed position, after all launched steps."""
        return self._contexts[slot].clone()

    @torch.no_grad()
    def launch(self, slots: Sequence[int], *, drafting: bool, longest: int) -> Pending:
        """Queue a step of the sequences in `slots`; no sequence has more than `longest` committed positions then.

        Without `drafting` none of them drafts.
        """
        with on_device(self._device):
            batch = power_of_two(len(slots))
            key = (batch, drafting, self._executor.span(longest))
            step = self._steps.get(key)
            if step is None:
                step = self._steps[key] = self._capture(*key)
            order = [*slots, *[self._idle] * (batch - len(slots))]
            if order != step.order:
                step.graph.fill(order)
                step.order = order
            step.graph.replay()
            place = self._launched % _RING
            self._launched += 1
            host, event = self._ring[place][:, : step.outcomes.shape[1]], self._events[place]
            host[:batch].copy_(step.outcomes, non_blocking=True)
            event.record()
            return Pending(host, event, len(slots))

    def _capture(self, batch: int, drafting: bool, span: int) -> _Step:
        """Warm-ups run on sequences that are done, which changes nothing."""
        shape = self.shape if drafting else DraftShape(1, 0)
        graph = CapturedGraph(batch, self._device)
        graph.fill([self._idle] * batch)
        outcomes = torch.zeros(batch, _HEADER + shape.draft_len + 1, dtype=torch.int64, device=self._device)
        parts = self._portions(batch, shape)
        graph.capture(lambda: self._compute(graph.input, outcomes, parts, shape, span), self._executor.pool)
        return _Step(graph, outcomes, parts)

    def _portions(self, batch: int, shape: DraftShape) -> list[_Portion]:
        nodes = shape.max_tree_tokens
        found = []
        for begin, end in portions([nodes] * batch):
            count = end - begin
            layout = tree_layout(count * nodes, count, nodes, shape.draft_len)
            zeros = self._sequences.new_zeros
            found.append(
                _Portion(
                    begin, layout, zeros(layout.size), zeros(layout.rows, dtype=torch.int32),
                    zeros(count, 1 + layout.path, dtype=torch.int32),
                )
            )  # fmt: skip
        return found

    def _compute(
        self, order: Tensor, outcomes: Tensor, parts: Sequence[_Portion], shape: DraftShape, span: int
    ) -> None:
        beams = scores = None
        if shape.draft_len:
            beams, scores = self._draft(order)
        for portion in parts:
            self._decode(order, outcomes, portion, shape, span, beams, scores)

    def _draft(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Beams [B, K, L + 1] and the scores of their beginnings, for the sequences in these slots."""
        search, batch = self._search, len(order)
        assert search is not None
        contexts, roots = self._contexts.new_empty(batch, self._contexts.shape[1]), torch.empty_like(order)
        self._kernel("gather", search.shape).launch(
            (batch,), 256,
            [pointer(self._sequences), pointer(order), pointer(self._contexts),
             ctypes.c_int(self._contexts.shape[1] // 2), pointer(contexts), pointer(roots)],
            overlap=False,
        )  # fmt: skip
        if batch <= search.largest:
            return search(contexts, roots)
        found = []
        for start in range(0, batch, search.largest):
            part = slice(start, start + search.largest)
            found.append([t.clone() for t in search(contexts[part], roots[part])])
        return torch.cat([tokens for tokens, _ in found]), torch.cat([scores for _, scores in found])

    def _decode(
        self, order: Tensor, outcomes: Tensor, portion: _Portion, shape: DraftShape, span: int,
        beams: Tensor | None, scores: Tensor | None,
    ) -> None:  # fmt: skip
        """One portion's trees, pass and acceptance."""
        model, layout, trees = self._executor.model, portion.layout, portion.trees()
        own = slice(portion.begin, portion.begin + layout.batch)
        entries = shape.num_beams * (shape.draft_len + 1)
        warps = max(1, min(32, layout.batch, (_SHARED - 4 * (layout.batch + 1)) // (8 * entries)))
        ours = [pointer(None if t is None else t[own]) for t in (beams, scores)]
        self._kernel("plan_trees", shape, layout, shared_bytes=_SHARED).launch(
            (1,), 32 * warps,
            [pointer(self._sequences), pointer(order[own]), ctypes.c_int(layout.batch), *ours,
             ctypes.c_int(layout.rows), trees, pointer(outcomes[own])],
            overlap=False,
        )  # fmt: skip
        model.launch(portion.packed, layout, span)
        model.launch_head(model.hidden, layout.rows)
        pairs = ctypes.c_int(self._contexts.shape[1] // 2)
        self._kernel("accept", shape, layout).launch(
            (layout.batch,), 128,
            [pointer(self._sequences), trees, pointer(model.best), pointer(model.hidden), pairs,
             pointer(self._contexts), pointer(outcomes[own])],
        )  # fmt: skip
        if shape.draft_len:
            keys, values = self._executor.cache
            layers, _, heads, capacity, size = keys.shape
            self._kernel("compact", shape, layout).launch(
                (2 * layers, heads, layout.batch), 32,
                [trees, pointer(keys), pointer(values), ctypes.c_longlong(keys.stride(0) * 2 // 16),
                 ctypes.c_longlong(capacity), ctypes.c_int(size * 2 // 16)],
            )  # fmt: skip

    def _kernel(self, name: str, shape: DraftShape, layout: Layout | None = None, *, shared_bytes: int = 0) -> Any:
        path = shape.draft_len + 1 if layout is None else layout.path
        constants = {"BEAMS": shape.num_beams, "LENGTH": shape.draft_len, "PATH": path}
        return compiled("step.cu", name, constants, shared_bytes=shared_bytes)
