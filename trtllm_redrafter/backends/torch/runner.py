"""Run requests on a loaded engine: admit, draft, verify, emit; one base-model forward pass per step.

A request joins the batch at the beginning of a step and leaves at the end of one. Its prompt is computed alone, or with
others where that changes no bit (`ModelExecutor.prefill_all`). Autoregression is the same code with trees of one node.

Where the executor has whole steps on the device (`cuda.steps`), greedy batches are decoded one step ahead of the host:
while a step runs, the host hands out what the one before it wrote. A step that turns out to be in vain, since a request
had ended, is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trtllm_redrafter.backends.base import EngineInfo, TeacherForced, Update
from trtllm_redrafter.backends.slots import SlotRequest, SlotRunner
from trtllm_redrafter.backends.tokenizer import EngineTokenizer
from trtllm_redrafter.backends.torch.executor import ModelExecutor, TreeOutput
from trtllm_redrafter.backends.torch.search import Search
from trtllm_redrafter.memory import memory_for
from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.sampling import NOT_FINITE, SamplingSettings, draw, uniform
from trtllm_redrafter.redrafter.token_tree import Tree

if TYPE_CHECKING:
    from trtllm_redrafter.backends.torch.cuda.steps import DeviceSteps, Pending


@dataclass(eq=False)
class _Sequence(SlotRequest):
    """A request and its place in the batch. `base` positions are committed; `root` is emitted but not computed yet."""

    base: int = 0
    root: int = -1
    context: Tensor = field(default_factory=lambda: torch.empty(0))  # [H], state of the last committed position
    on_device: bool = False
    """Are the next root and context, and how many positions are committed, kept by `DeviceSteps`?"""
    ahead: int = 0
    """Steps under way."""


class TorchRunner(SlotRunner[_Sequence]):
    """The torch backend's runner; `backend.TorchBackend.load` makes it."""

    def __init__(
        self,
        info: EngineInfo,
        executor: ModelExecutor,
        drafting: Search | None,
        tokenizer: EngineTokenizer | None,
        eos_token_ids: frozenset[int],
        notes: tuple[str, ...] = (),
        *,
        steps: DeviceSteps | None = None,
    ) -> None:
        """`steps`: of this executor and drafting, if it has them."""
        super().__init__(info, tokenizer, eos_token_ids, notes, _Sequence)
        self.executor = executor
        self.row_invariant = executor.row_invariant
        self.prepares_shapes = executor.pool is not None
        self._drafting = drafting
        self._settings: SamplingSettings | None = None  # of the present batch
        self._steps = steps
        self._ahead: deque[tuple[list[_Sequence], Pending]] = deque()
        self._last_read = 0.0

    @torch.no_grad()
    def step(self) -> list[Update]:
        with self.executor.threads(), self._step_memory(self.executor.device):
            updates: list[Update] = []
            if self._waiting and self._free:
                count = min(len(self._waiting), len(self._free))
                updates.extend(self._admit([self._waiting.popleft() for _ in range(count)]))
            if self._active:
                updates.extend(self._decode())
            return updates

    def autoregressive(self) -> TorchRunner:
        """On the executor that is faster without drafting, if there is one."""
        if self._drafting is None:
            return self
        remedy = "build with a smaller --max-batch-size or --max-seq-len"
        with memory_for("a second KV cache, which decoding without drafting has", remedy=remedy):
            executor = self.executor.undrafted()
        if executor is self.executor:
            return self
        return TorchRunner(self.info, executor, None, self._tokenizer, self._eos)

    @torch.no_grad()
    def teacher_forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> TeacherForced:
        """The first row comes from the prompt's pass, the others from chains no longer than a tree."""
        width = 1 if self.info.draft_shape is None else self.info.draft_shape.max_tree_tokens
        with self.executor.threads():
            first = self.executor.prefill(0, prompt)
            logits, states = [first.logits.float().clone().unsqueeze(0)], [first.hidden.clone().unsqueeze(0)]
            for start in range(0, len(tokens) - 1, width):
                chunk = list(tokens[start : min(start + width, len(tokens) - 1)])
                base = len(prompt) + start
                output = self.executor.forward([0], [base], [Tree.merge([chunk])], logits=True)
                assert output.logits is not None
                logits.append(output.logits.float().clone())  # the next pass may write to the same place
                states.append(output.hidden.clone())
                self.executor.commit(0, base, range(len(chunk)))
        return TeacherForced(torch.cat(logits), torch.cat(states))

    @torch.no_grad()
    def drafts(self, contexts: Tensor, roots: Sequence[int]) -> Beams | None:
        if self._drafting is None:
            return None
        size = self.info.max_batch_size  # what the kernels have memory for
        parts = [
            self._drafting.beams(contexts[start : start + size], roots[start : start + size])
            for start in range(0, len(roots), size)
        ]
        return Beams(torch.cat([p.tokens for p in parts]), torch.cat([p.path_scores for p in parts]), None)

    def close(self) -> None:
        self._drafting = self._steps = None  # their graphs hold memory of the executor's
        self._ahead.clear()
        self.executor.close()

    def _clear(self, sequence: _Sequence) -> None:
        self.executor.clear(sequence.slot, 0, sequence.base)

    def _leave(self, sequence: _Sequence) -> None:
        self._settings = None

    def _admit(self, joining: list[_Sequence]) -> list[Update]:
        """Compute prompts and emit their first tokens."""
        start = time.perf_counter()
        slots = self._free[: len(joining)]
        outputs = self.executor.prefill_all(slots, [a.request.token_ids for a in joining])
        del self._free[: len(joining)]  # prompts that fail must not keep their slots
        logits = torch.stack([output.logits for output in outputs])
        settings = SamplingSettings.of([a.request.sampling for a in joining], logits.device)
        uniforms = uniform([a.seed for a in joining], [0] * len(joining)).to(logits.device)
        roots = draw(logits, settings, uniforms).tolist()
        elapsed = time.perf_counter() - start
        for sequence, slot, output, root in zip(joining, slots, outputs, roots, strict=True):
            sequence.slot, sequence.root = slot, root
            sequence.base, sequence.context = len(sequence.request.token_ids), output.hidden
            sequence.result.queue_seconds, sequence.result.prefill_seconds = start - sequence.since, elapsed
            if self._drafting is not None:
                sequence.result.accepted_per_position = [0] * self._drafting.shape.draft_len
        self._active += joining
        self._settings = None
        self._last_read += elapsed  # no part of the steps of others
        return [self._fail(a) if a.root == NOT_FINITE else self._emit(a, [a.root]) for a in joining]

    def _decode(self) -> list[Update]:
        """One step of the whole batch."""
        batch = list(self._active)
        settings = self._batch_settings(batch)
        if self._steps is not None and not settings.any_sampled:
            return self._decode_ahead(batch, self._steps)
        if self._steps is not None and any(a.on_device for a in batch):
            return self._take_back(self._steps)
        start = time.perf_counter()
        trees = self._propose(batch)
        slots, bases = [a.slot for a in batch], [a.base for a in batch]
        output = self.executor.forward(slots, bases, trees, logits=settings.any_sampled)
        emitted = self._accept(batch, trees, output, _draw(batch, trees, output, settings))
        elapsed = time.perf_counter() - start
        for sequence in batch:
            sequence.result.decode_seconds += elapsed
        return [
            self._emit(sequence, tokens, drafted=max(tree.depths))
            if tokens
            else self._retry_or_fail(sequence, drafted=len(tree) > 1)
            for sequence, tokens, tree in zip(batch, emitted, trees, strict=True)
        ]

    def _decode_ahead(self, batch: list[_Sequence], steps: DeviceSteps) -> list[Update]:
        """Keep one step more queued than the one that is waited for."""
        for sequence in batch:
            if not sequence.on_device:
                sequence.on_device = True
                stops = (*sequence.request.sampling.stop_token_ids, *self._own_ends(sequence))
                steps.admit(
                    sequence.slot, root=sequence.root, base=sequence.base, context=sequence.context,
                    remaining=sequence.remaining, drafts=self._drafts(sequence), stops=stops,
                )  # fmt: skip
        while self._ahead and all(a.result.finish_reason is not None for a in self._ahead[0][0]):
            self._ahead.popleft()
        if not self._ahead:
            self._last_read = time.perf_counter()
            self._launch(batch, steps)
        if any(a.remaining > self._most_written(a) for a in batch):
            self._launch(batch, steps)
        return self._read_step()

    def _launch(self, batch: list[_Sequence], steps: DeviceSteps) -> None:
        longest = max(a.base + self._most_written(a) for a in batch)
        drafting = any(self._drafts(a) for a in batch)
        for sequence in batch:
            sequence.ahead += 1
        self._ahead.append((batch, steps.launch([a.slot for a in batch], drafting=drafting, longest=longest)))

    def _read_step(self) -> list[Update]:
        """Wait for the oldest step, and hand out what it wrote."""
        sequences, pending = self._ahead.popleft()
        outcomes = pending.wait()
        now = time.perf_counter()
        elapsed, self._last_read = max(0.0, now - self._last_read), now
        updates = []
        for sequence, outcome in zip(sequences, outcomes, strict=True):
            sequence.ahead -= 1
            if sequence.result.finish_reason is not None:
                continue
            sequence.result.decode_seconds += elapsed
            if not outcome.drafter_finite and self._drafting is not None:
                self._drafting.note_not_finite()
                self.drafter_error = self._drafting.error
            if not outcome.logits_finite:
                updates.append(self._retry_or_fail(sequence, drafted=outcome.drafted_tokens > 0))
                continue
            sequence.base += len(outcome.tokens)
            sequence.root = outcome.tokens[-1]
            updates.append(self._emit(sequence, outcome.tokens, drafted=outcome.drafted_tokens))
        return updates

    def _take_back(self, steps: DeviceSteps) -> list[Update]:
        """A request that samples has joined: read all steps under way, and go on with the host in between."""
        updates = []
        while self._ahead:
            updates.extend(self._read_step())
        for sequence in self._active:
            if sequence.on_device:
                sequence.on_device, sequence.context = False, steps.context(sequence.slot)
        return updates

    def _most_written(self, sequence: _Sequence) -> int:
        """Tokens that the steps under way can have written at most, and so positions committed."""
        width = 1 + (self._drafting.shape.draft_len if self._drafting is not None and self._drafts(sequence) else 0)
        return width * sequence.ahead

    def _drafts(self, sequence: _Sequence) -> bool:
        return self._drafting is not None and sequence.request.draft

    def _own_ends(self, sequence: _Sequence) -> frozenset[int]:
        return frozenset() if sequence.request.sampling.ignore_eos else self._eos

    def _propose(self, batch: list[_Sequence]) -> list[Tree]:
        """A tree for every request; one that does not draft, or has one token left to write, gets its root alone."""
        trees = [Tree.root(a.root) for a in batch]
        if self._drafting is not None:
            rows = [i for i, a in enumerate(batch) if a.request.draft and a.remaining > 1 and not a.undrafted]
            drafted = [batch[i] for i in rows]
            if rows:
                found = self._drafting.propose([a.context for a in drafted], [a.root for a in drafted])
                self.drafter_error = self._drafting.error
                for row, tree in zip(rows, found, strict=True):
                    trees[row] = tree
        return trees

    def _batch_settings(self, batch: list[_Sequence]) -> SamplingSettings:
        """Sampling parameters as tensors, made again only when the batch has changed."""
        if self._settings is None:
            self._settings = SamplingSettings.of([a.request.sampling for a in batch], batch[0].context.device)
        return self._settings

    def _accept(
        self, batch: list[_Sequence], trees: list[Tree], output: TreeOutput, draws: list[int]
    ) -> list[list[int]]:
        """Walk each tree with its nodes' draws and commit the path; the tokens each request gained.

        Where a row of the path has no finite logits, that is none, and nothing is committed.
        """
        gained, first = [], 0
        for sequence, tree in zip(batch, trees, strict=True):
            own = draws[first : first + len(tree)]
            path = tree.walk(own)
            sequence.undrafted = own[path[-1]] == NOT_FINITE
            kept = 0 if sequence.undrafted else len(path)
            if kept:
                self.executor.commit(sequence.slot, sequence.base, path)
                sequence.root = own[path[-1]]
                sequence.context = output.hidden[first + path[-1]]
            if NOT_FINITE in own:
                self.executor.clear(sequence.slot, sequence.base + kept, sequence.base + len(tree))
            sequence.base += kept
            gained.append([own[node] for node in path[:kept]])
            first += len(tree)
        return gained


def _draw(batch: list[_Sequence], trees: list[Tree], output: TreeOutput, settings: SamplingSettings) -> list[int]:
    """The base model's own next token at every node, drawn with the uniform of its output position.

    This and the walk are the `exact` rule of `redrafter.reference`, without padding.
    """
    if output.logits is None:
        return output.best.tolist()
    sizes = [len(tree) for tree in trees]
    seeds = np.repeat([a.seed for a in batch], sizes)
    positions = [len(a.result.token_ids) + d for a, tree in zip(batch, trees, strict=True) for d in tree.depths]
    uniforms = uniform(seeds, positions).to(output.logits.device)
    return draw(output.logits, settings.repeat_each(sizes), uniforms).tolist()
