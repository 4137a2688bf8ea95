"""The runner with steps queued ahead of it: the same results as step by step.

`HostSteps` stands in for the steps on a GPU. What it queues is computed at once, as a stream would in that order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.test_not_finite import damaged_engine
from tests.engines import build_engine, load, write_checkpoint, write_tokenizer
from trtllm_redrafter.backends.base import FinishReason, Request, Result, SamplingParams
from trtllm_redrafter.backends.torch.cuda.steps import STOPS, Outcome
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.backends.torch.search import Search
from trtllm_redrafter.errors import NumericalError
from trtllm_redrafter.redrafter.beam_search import Beams
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.redrafter.sampling import NOT_FINITE
from trtllm_redrafter.redrafter.token_tree import Tree

PROMPTS = ((5, 9, 23, 7), (3,), (11, 60, 4, 44, 31, 17, 8, 9, 10), (30, 31), (40, 8, 9), (12, 13, 14))
COUNTED = ("token_ids", "text", "finish_reason", "stop_reason", "steps", "drafted_tokens", "accepted_tokens",
           "accepted_per_position")  # fmt: skip


class Followers(Search):
    """Drafts the tokens that followed each token before: two beams, of the first and of the last follower."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        super().__init__(DraftShape(2, 3), torch.float32)
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        for text in texts:
            for token, following in itertools.pairwise(text):
                self.first.setdefault(token, following)
                self.last[token] = following

    def beams(self, contexts: Tensor, roots: Sequence[int]) -> Beams:
        rows = []
        for root in roots:
            beams = [[root], [root]]
            for _ in range(3):
                for beam, known in zip(beams, (self.first, self.last), strict=True):
                    beam.append(known.get(beam[-1], 0))
            rows.append(beams)
        return Beams(torch.tensor(rows), torch.zeros(len(roots), 2, 4), None)


@dataclass
class _State:
    root: int
    base: int
    remaining: int
    context: Tensor
    drafts: bool
    stops: Sequence[int]
    done: bool = False
    draftless: bool = False


class HostSteps:
    """`DeviceSteps` on the host."""

    def __init__(self, runner: TorchRunner) -> None:
        self._runner, self._slots = runner, dict[int, _State]()
        self.launched, self.in_vain, self.longest_seen = 0, 0, 0

    def admit(self, slot: int, *, stops: Sequence[int], **values: Any) -> None:
        self._slots[slot] = _State(stops=list(stops)[:STOPS], **values)

    def context(self, slot: int) -> Tensor:
        return self._slots[slot].context

    def launch(self, slots: Sequence[int], *, drafting: bool, longest: int) -> HostSteps._Done:
        states = [self._slots[slot] for slot in slots]
        assert all(state.base <= longest for state in states) and (drafting or not any(s.drafts for s in states))
        self.launched += 1
        self.in_vain += all(state.done for state in states)
        return HostSteps._Done([self._step(slot, state) for slot, state in zip(slots, states, strict=True)])

    def _step(self, slot: int, state: _State) -> Outcome:
        search, executor = self._runner._drafting, self._runner.executor
        if state.done:
            return Outcome([], 0, True, True)
        tree, finite = Tree.root(state.root), True
        if search is not None and state.drafts and not state.draftless and state.remaining > 1:
            beams, good = search.search([state.context], [state.root])
            finite = all(good)
            tree = Tree.merge(beams[0]) if finite else tree
        drafted = max(tree.depths)
        output = executor.forward([slot], [state.base], [tree], logits=False)
        draws = output.best.tolist()
        path = tree.walk(draws)
        if draws[path[-1]] == NOT_FINITE:
            executor.clear(slot, state.base, state.base + len(tree))
            state.draftless, state.done = drafted > 0, drafted == 0
            return Outcome([], drafted, finite, False)
        executor.commit(slot, state.base, path)
        state.context = output.hidden[path[-1]].clone()
        state.base += len(path)
        state.root, state.draftless, tokens = draws[path[-1]], False, list[int]()
        for node in path:
            tokens.append(draws[node])
            state.remaining -= 1
            state.done = state.remaining <= 0 or draws[node] in state.stops
            if state.done:
                break
        return Outcome(tokens, drafted, finite, True)

    class _Done:
        def __init__(self, outcomes: list[Outcome]) -> None:
            self._outcomes = outcomes

        def wait(self) -> list[Outcome]:
            return self._outcomes


def ahead(runner: TorchRunner) -> HostSteps:
    steps = HostSteps(runner)
    runner._steps = steps  # type: ignore[assignment]
    return steps


def counted(results: Sequence[Result]) -> list[list[object]]:
    return [[getattr(result, name) for name in COUNTED] for result in results]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    """Texts of this model repeat themselves, so that many drafts are accepted."""
    folder = tmp_path_factory.mktemp("ahead")
    checkpoint = write_checkpoint(folder, vocab_size=259, dtype="float32")
    engine = build_engine(checkpoint, folder / "engine", write_tokenizer(folder / "tokenizer"), max_batch_size=3)
    runner = load(engine)
    greedy = SamplingParams(60, ignore_eos=True)
    runner._drafting = Followers([r.token_ids for r in runner.generate([Request(p, greedy) for p in PROMPTS])])
    return runner


def requests(texts: dict[tuple[int, ...], list[int]]) -> list[Request]:
    """Every way to end: limits from one token on, stop tokens and stop strings in the middle of a step, end tokens."""
    found = [Request(p, SamplingParams(n, ignore_eos=True)) for p in PROMPTS for n in (1, 2, 7, 31)]
    for prompt, text in texts.items():
        found.append(Request(prompt, SamplingParams(40, ignore_eos=True, stop_token_ids=(text[9],))))
        found.append(Request(prompt, SamplingParams(40, ignore_eos=True), draft=False))
        many = tuple(t for t in range(3, 40) if t not in text)[:STOPS]
        found.append(Request(prompt, SamplingParams(40, ignore_eos=True, stop_token_ids=(*many, text[12]))))
    return found


def test_results_are_those_of_single_steps(runner: TorchRunner) -> None:
    texts = {p: runner.generate([Request(p, SamplingParams(40, ignore_eos=True))])[0].token_ids for p in PROMPTS}
    expected = counted(runner.generate(requests(texts)))
    steps = ahead(runner)
    try:
        assert counted(runner.generate(requests(texts))) == expected
        assert sum(accepted for *_, accepted, _ in expected) > 100  # type: ignore[misc]
        # In vain are only the steps after an end that the device does not know, and those after a batch's last end.
        assert steps.launched > 100 and steps.in_vain <= len(expected)
    finally:
        runner._steps = None


def test_stop_strings_cancelling_and_sampling_beside_it(runner: TorchRunner) -> None:
    greedy = SamplingParams(30, ignore_eos=True)
    text = runner.generate([Request(PROMPTS[0], greedy)])[0].text
    stop = SamplingParams(30, ignore_eos=True, stop=(text[8:10],))
    sampled = SamplingParams(30, temperature=0.9, seed=4, ignore_eos=True)
    batch = [Request(PROMPTS[0], stop), Request(PROMPTS[1], greedy), Request(PROMPTS[2], sampled)]

    def run() -> list[list[object]]:
        results: dict[str, Result] = {}
        runner.submit(Request(PROMPTS[3], greedy, request_id="cancelled"))
        for number, request in enumerate([*batch, *batch]):
            runner.submit(Request(request.token_ids, request.sampling, request_id=str(number)))
            results |= {u.request_id: u.result for u in runner.step() if u.result}
            if number == 2:
                assert runner.cancel("cancelled") is not None
        while runner.has_work:
            results |= {u.request_id: u.result for u in runner.step() if u.result}
        return counted([results[str(number)] for number in range(6)])

    expected = run()
    ahead(runner)
    try:
        assert run() == expected
        assert [row[2] for row in expected] == [FinishReason.STOP, FinishReason.LENGTH, FinishReason.LENGTH] * 2
    finally:
        runner._steps = None


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """A broken token in drafts costs a step; in a text it ends the request, and its neighbours go on."""
    nan, greedy = torch.tensor(float("nan")), SamplingParams(30, ignore_eos=True)
    batch = [Request(p, greedy) for p in ((5, 9, 22, 7), (3,), (11, 60, 4, 44))]
    good = load(damaged_engine(tmp_path / "good", "float32", None, None)).generate(batch)
    victim = good[1].token_ids[5]
    engine = damaged_engine(
        tmp_path / "bad", "float32", lambda t: t["model.embed_tokens.weight"].__setitem__(victim, nan), None
    )
    outcomes = []
    for on_device in (False, True):
        runner = load(engine)
        if on_device:
            ahead(runner)
        with pytest.raises(NumericalError) as caught:
            runner.generate(batch)
        results = [r for r in caught.value.results if isinstance(r, Result)]
        outcomes.append((counted(results), [None if r.error is None else str(r.error) for r in results]))
    assert outcomes[0] == outcomes[1]
    broken = load(damaged_engine(tmp_path / "drafter", "float32", None, lambda t: t["rnn_u.bias"].__setitem__(0, nan)))
    ahead(broken)
    assert [r.token_ids for r in broken.generate(batch)] == [r.token_ids for r in good]
    assert broken.drafter_error is not None
