"""What a runner makes of responses, one by one: a client that plays a written script stands for the engine."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.prompts.test_sampling import WithNewOption
from trtllm_redrafter.backends.base import EngineInfo, FinishReason, Request, Result, SamplingParams, Update
from trtllm_redrafter.backends.tensorrt_llm import runner as runner_module
from trtllm_redrafter.backends.tensorrt_llm.client import ClientRequest, Event
from trtllm_redrafter.backends.tensorrt_llm.requests import request_problems
from trtllm_redrafter.backends.tensorrt_llm.runner import TensorRTRunner
from trtllm_redrafter.errors import BackendError, RequestError
from trtllm_redrafter.redrafter.config import DraftShape

END = 2


class Script:
    """A client whose polls return what was written down for them."""

    def __init__(self, *polls: list[Event] | Exception) -> None:
        self.polls = list(polls)
        self.sent: list[ClientRequest] = []
        self.cancelled: list[int] = []

    def submit(self, request: ClientRequest) -> None:
        if request.token_ids == [9]:
            raise RuntimeError("[TensorRT-LLM] prompt is refused")
        self.sent.append(request)

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def poll(self, timeout: float) -> list[Event]:
        found = self.polls.pop(0) if self.polls else []
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None: ...


def make(script: Script, shape: DraftShape | None = DraftShape(2, 3), *, greedy: bool = True) -> TensorRTRunner:
    info = EngineInfo(Path("engine"), "tensorrt-llm", "a GPU", "bfloat16", 100, 4, 50, 100, shape)
    return TensorRTRunner(info, script, None, frozenset({END, 7}), greedy=greedy)


def responses(number: int, *parts: tuple[int, ...], finish: str = "length", iterations: bool = True) -> list[Event]:
    return [
        Event(number, part, final=at == len(parts), finish=finish if at == len(parts) else None,
              decoding_iter=at if iterations else None)
        for at, part in enumerate(parts, start=1)
    ]  # fmt: skip


def one(script: Script, max_tokens: int = 20, shape: DraftShape | None = DraftShape(2, 3)) -> Result:
    (result,) = make(script, shape).generate([Request((5,), SamplingParams(max_tokens=max_tokens))])
    return result


@pytest.mark.parametrize("last", [(20, 21), (20, 21, END), (20, 21, END, 30)])
def test_the_end_token_may_be_cut_off_kept_or_overrun(last: tuple[int, ...]) -> None:
    """One request, three decoders: every figure is the same."""
    result = one(Script(responses(0, (10,), (11, 12), last, finish="end_id")))
    assert result.token_ids == [10, 11, 12, 20, 21, END] and result.finish_reason is FinishReason.STOP
    assert (result.steps, result.accepted_tokens, result.accepted_per_position) == (2, 3, [2, 1, 0])
    assert result.steps + result.accepted_tokens == len(result.token_ids) - 1 and result.drafted_tokens == 6


def test_a_step_that_only_ends_is_a_step() -> None:
    result = one(Script(responses(0, (10,), (11, 12), (), finish="end_id")))
    assert result.token_ids == [10, 11, 12, END] and (result.steps, result.accepted_per_position) == (2, [1, 0, 0])
    first = one(Script(responses(0, (), finish="end_id")))
    assert first.token_ids == [END] and first.steps == 0 and first.finish_reason is FinishReason.STOP


def test_other_end_tokens_are_stop_words_and_stay() -> None:
    result = one(Script(responses(0, (10,), (11, 7), finish="stop_words")))
    assert result.token_ids == [10, 11, 7] and result.finish_reason is FinishReason.STOP


def test_more_than_was_asked_for_is_cut() -> None:
    script = Script([Event(0, (10,), decoding_iter=1), Event(0, (11, 12, 13, 14), decoding_iter=2)])
    result = one(script, max_tokens=3)
    assert result.token_ids == [10, 11, 12] and result.finish_reason is FinishReason.LENGTH
    assert result.accepted_tokens == 1 and script.cancelled == [0]


def test_iterations_are_counted_from_the_prefill() -> None:
    """Whether a release counts the prefill, or each piece of it: what comes after are the steps."""
    for offset in (-1, 0, 4):
        script = [
            Event(e.number, e.token_ids, e.final, e.finish, (e.decoding_iter or 0) + offset)
            for e in responses(0, (10,), (11, 12), (13,))
        ]
        result = one(Script(script))
        assert (result.steps, result.accepted_tokens, result.accepted_per_position) == (2, 1, [1, 0, 0]), offset


def test_merged_responses_are_told_by_iterations() -> None:
    parts = [Event(0, (10, 11, 12), decoding_iter=2), Event(0, (13, 14, 15, 16, 17), True, "length", 4)]
    result = one(Script(parts))
    assert (result.steps, result.accepted_tokens, result.drafted_tokens, result.accepted_per_position) == (3, 4, 9, [])


@pytest.mark.parametrize("parts", [((10, 11, 12), (13,)), ((10,), (11, 12, 13, 14, 15), (16,))])
def test_merged_responses_without_iterations_are_not_counted(parts: tuple[tuple[int, ...], ...]) -> None:
    """No figure is better than an acceptance rate above 1."""
    result = one(Script(responses(0, *parts, iterations=False)))
    assert result.acceptance_length is None and result.acceptance_rate is None and not result.accepted_per_position
    assert len(result.token_ids) == sum(map(len, parts))


def test_without_a_drafter() -> None:
    result = one(Script(responses(0, (10,), (11,), (12,))), shape=None)
    assert (result.steps, result.accepted_tokens, result.drafted_tokens, result.accepted_per_position) == (2, 0, 0, [])


def finished(updates: list[Update]) -> dict[str, list[int]]:
    return {u.request_id: u.result.token_ids for u in updates if u.result is not None}


def test_an_error_takes_nothing_from_the_others() -> None:
    """Two requests in one poll, and the first one's error between the other's responses."""
    second = responses(1, (20,), (21,))
    script = Script([second[0], Event(0, final=True, error="boom"), second[1]])
    runner = make(script)
    for name in ("first", "second"):
        runner.submit(Request((5,), SamplingParams(max_tokens=2), name))
    assert [u.token_ids for u in runner.step()] == [(20,)]
    with pytest.raises(BackendError, match="boom"):
        runner.step()
    assert finished(runner.step()) == {"second": [20, 21]} and not runner.has_work


def test_results_of_others_do_not_end_a_generate() -> None:
    script = Script(responses(0, (10,)) + responses(1, (20,), (21,))[:1], responses(1, (20,), (21,))[1:])
    runner = make(script)
    runner.submit(Request((5,), SamplingParams(max_tokens=2), "left over"))
    (result,) = runner.generate([Request((6,), SamplingParams(max_tokens=2))])
    assert result.token_ids == [20, 21]


def test_responses_in_flight_when_a_request_is_cancelled() -> None:
    script = Script([Event(0, (10,), decoding_iter=1)], [Event(0, (11, 12), decoding_iter=2), *responses(1, (20,))])
    runner = make(script)
    gone = runner.submit(Request((5,), SamplingParams(max_tokens=9)))
    runner.submit(Request((6,), SamplingParams(max_tokens=1), "other"))
    runner.step()
    result = runner.cancel(gone)
    assert result is not None and result.token_ids == [10] and script.cancelled == [0]
    assert finished(runner.step()) == {"other": [20]} and runner.step() == []


def test_silence_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that was killed answers nothing, and neither do the ones that wait for it."""
    monkeypatch.setattr(runner_module, "SILENCE_SECONDS", 0.05)
    runner = make(Script([Event(0, (10,), decoding_iter=1)]))
    time.sleep(0.1)  # idle: nobody is expected to answer
    runner.submit(Request((5,), SamplingParams(max_tokens=9)))
    assert runner.step()[0].token_ids == (10,) and runner.step() == []
    time.sleep(0.1)
    with pytest.raises(BackendError, match="has not answered"):
        runner.step()


def test_a_refused_request_is_a_message() -> None:
    runner = make(Script())
    with pytest.raises(RequestError, match="prompt is refused"):
        runner.submit(Request((9,), SamplingParams(max_tokens=3)))
    assert not runner.has_work


def test_sampling_is_asked_for_in_so_many_words() -> None:
    """Without top-k and top-p TensorRT-LLM decodes greedily, and its own seed is always the same."""
    script = Script()
    runner = make(script, None)
    for _ in range(2):
        runner.submit(Request((5,), SamplingParams(max_tokens=3, temperature=0.7)))
    runner.submit(Request((5,), SamplingParams(max_tokens=3, temperature=0.7, seed=4, top_k=3)))
    runner.submit(Request((5,), SamplingParams(max_tokens=3)))
    seeds = [r.sampling.pop("seed", None) for r in script.sent]
    assert [r.sampling for r in script.sent] == [
        {"temperature": 0.7, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 1.0, "top_k": 3},
        {"top_k": 1},
    ]
    assert seeds[0] != seeds[1] and None not in seeds[:2] and seeds[2:] == [4, None]
    drafting = Script()
    make(drafting, greedy=False).submit(Request((5,), SamplingParams(max_tokens=3, temperature=0.7, seed=1)))
    assert drafting.sent[0].sampling == {"temperature": 0.7, "seed": 1}


def test_an_option_that_nobody_passes_on_is_refused() -> None:
    """One that is added to `SamplingParams` and not here must not change nothing in silence."""
    asked = Request((5,), WithNewOption(max_tokens=3, temperature=0.7, new_option=0.1))
    for shape, why in ((None, "not passed on"), (DraftShape(2, 2), "ReDrafter decoder ignores it")):
        info = replace(make(Script(), None).info, draft_shape=shape)
        [problem] = request_problems(asked, info, greedy=False, has_tokenizer=True)
        assert problem.what == "new_option is 0.1" and why in str(problem.why)
        off = replace(asked, sampling=replace(asked.sampling, new_option=0.0))
        assert not request_problems(off, info, greedy=False, has_tokenizer=True)
