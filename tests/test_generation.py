"""Jobs through a runner that only counts, and the figures over their results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.prompts.test_sampling import WithNewOption
from trtllm_redrafter.backends.base import EngineInfo, Request, Result, Runner, SamplingParams, Update
from trtllm_redrafter.backends.requests import SpecDecodingStats
from trtllm_redrafter.errors import BackendError, InputError, RequestError
from trtllm_redrafter.prompts.messages import Prompt
from trtllm_redrafter.run.jobs import Job, RunSummary, prompt_jobs, read_jobs
from trtllm_redrafter.run.results import _request_key
from trtllm_redrafter.run.session import run_jobs

DEFAULTS = Job("", "", Prompt("", chat=False), SamplingParams(max_tokens=2))


class CountingRunner(Runner):
    """Takes one step per token, two requests at a time; a prompt of "bad" is refused."""

    def __init__(self) -> None:
        self.info = EngineInfo(Path("engine"), "none", "none", "none", 9, 2, 9, 9, None)
        self.requests: dict[str, tuple[Request, Result]] = {}
        self.most = 0

    def submit(self, request: Request) -> str:
        if request.token_ids == (0,):
            raise RequestError("this one is bad", why="the test says so", remedy="write another")
        name = f"r{len(self.requests)}-{id(request)}"
        self.requests[name] = (request, Result(name, len(request.token_ids)))
        self.most = max(self.most, len(self.requests))
        return name

    def step(self) -> list[Update]:
        updates = []
        for name, (request, result) in list(self.requests.items())[: self.info.max_batch_size]:
            result.token_ids.append(len(result.token_ids))
            done = len(result.token_ids) == request.sampling.max_tokens
            updates.append(Update(name, (0,), "x", result if done else None))
            if done:
                del self.requests[name]
        return updates

    def cancel(self, request_id: str) -> Result | None:
        found = self.requests.pop(request_id, None)
        return None if found is None else found[1]

    def close(self) -> None:
        self.requests.clear()

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def has_chat_template(self) -> bool:
        return False

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return (0,) if prompt.content == "bad" else (1, 2)


def jobs(*prompts: str) -> Iterator[Job]:
    yield from prompt_jobs(prompts, DEFAULTS)


def test_jobs_are_read_no_further_ahead_than_the_batch_can_use() -> None:
    runner, read = CountingRunner(), 0

    def counted() -> Iterator[Job]:
        nonlocal read
        for job in jobs(*["x"] * 50):
            read += 1
            yield job

    finished = run_jobs(runner, counted(), one_by_one=False)
    next(finished)
    assert read <= 4
    assert len(list(finished)) == 49 and runner.most == 4


def test_one_by_one_never_overlaps() -> None:
    runner, seen = CountingRunner(), []
    for job in run_jobs(runner, jobs("a", "b"), one_by_one=True, on_update=lambda job, _: seen.append(job.job_id)):
        seen.append("end of " + job.job_id)
    assert seen == ["prompt-1", "prompt-1", "end of prompt-1", "prompt-2", "prompt-2", "end of prompt-2"]
    assert runner.most == 1


def test_refused_prompts_fail_with_their_own_place() -> None:
    finished = list(run_jobs(CountingRunner(), jobs("a", "bad", "b"), one_by_one=False))
    assert [job.job_id for job in finished] == ["prompt-2", "prompt-1", "prompt-3"]
    error = finished[0].error
    assert error is not None and error.exit_code == 7
    assert error.problem.as_dict() == {
        "what": "this one is bad",
        "where": "prompt 2",
        "why": "the test says so",
        "remedy": "write another",
    }


def test_an_error_that_names_a_request_fails_its_job_and_the_others_run() -> None:
    class Failing(CountingRunner):
        def step(self) -> list[Update]:
            name = next(iter(self.requests))
            if self.requests[name][0].sampling.seed == 7:
                del self.requests[name]
                raise BackendError("it went wrong", where=name)
            return super().step()

    first, second, third = jobs("a", "b", "c")
    second = replace(second, sampling=replace(second.sampling, seed=7))
    finished = {job.job_id: job for job in run_jobs(Failing(), [first, second, third], one_by_one=True)}
    assert [job.error is None for job in finished.values()] == [True, False, True]
    error = finished["prompt-2"].error
    assert error is not None and error.problem.where == "prompt 2" and error.exit_code == 6

    class Broken(CountingRunner):
        def step(self) -> list[Update]:
            raise BackendError("the engine is gone", where="engine")

    runner = Broken()
    with pytest.raises(BackendError, match="gone"):
        list(run_jobs(runner, jobs("a", "b"), one_by_one=False))
    assert not runner.has_work


def test_a_prompt_the_program_stumbles_over_costs_its_own_line() -> None:
    class Stumbling(CountingRunner):
        def submit(self, request: Request) -> str:
            if request.sampling.seed == 7:
                raise OverflowError("int too large to convert to float")
            return super().submit(request)

    first, second = jobs("a", "b")
    first = replace(first, sampling=replace(first.sampling, seed=7))
    bad, good = run_jobs(Stumbling(), [first, second], one_by_one=False)
    assert bad.error is not None and "OverflowError" in bad.error.render() and good.result is not None


def test_leaving_early_leaves_nothing_queued() -> None:
    runner = CountingRunner()
    finished = run_jobs(runner, jobs(*"abcdef"), one_by_one=False)
    next(finished)
    finished.close()  # type: ignore[attr-defined]
    assert not runner.has_work


def test_nothing_to_do() -> None:
    assert list(run_jobs(CountingRunner(), [], one_by_one=False)) == []


def test_lines_are_read_lazily_and_blank_ones_pass(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('\n{"prompt": "a", "top_p": 0.5}\n   \n{"prompt": "b", "id": 7, "seed": null}\n{')
    found = read_jobs(path, DEFAULTS)
    first, second, third = found
    assert (first.job_id, first.sampling.top_p, first.error) == ("line-2", 0.5, None)
    assert (second.job_id, second.sampling, second.error) == ("7", DEFAULTS.sampling, None)
    assert third.error is not None and "line 5" in third.where
    with pytest.raises(InputError, match="a directory, not a file"):
        list(read_jobs(tmp_path, DEFAULTS))


def test_rows_of_earlier_versions_are_still_kept(tmp_path: Path) -> None:
    """A row's hash follows from the request alone; it does not change with the types that hold one."""
    path = tmp_path / "in.jsonl"
    lines = (
        '{"prompt": "a", "top_p": 0.5, "stop": "x"}',
        '{"messages": [{"role": "user", "content": "b"}], "draft": false, "chat_template_kwargs": {"k": 1}}',
    )
    path.write_text("\n".join(lines))
    assert [_request_key(job, "") for job in [*jobs("a"), *read_jobs(path, DEFAULTS)]] == [
        "42123b016fece2c3d93eb7dac1cd6a71366dee7602bdcdf34797db5254afc343",
        "74d6a08a3582d2996501bcdb97e8a8e15dfd8602b57ae5eb97762c5e29f9a693",
        "5f2be92643b6c7362975c6a3ab99c30fcbe00d1892b8e56297bd75a4806f24bf",
    ]


def test_an_option_that_is_off_is_not_in_the_hash() -> None:
    [job] = jobs("a")
    off, on = (replace(job, sampling=WithNewOption(**vars(job.sampling), new_option=value)) for value in (0.0, 0.1))
    assert _request_key(job, "") == _request_key(off, "") != _request_key(on, "")


def test_figures() -> None:
    summary = RunSummary()
    one = Result("1", prompt_tokens=5, token_ids=[1] * 7, steps=3, drafted_tokens=12, accepted_tokens=3)
    one.accepted_per_position, one.decode_seconds, one.prefill_seconds = [2, 1], 2.0, 0.5
    two = Result("2", prompt_tokens=2, token_ids=[1] * 2, steps=1, drafted_tokens=4, accepted_tokens=0)
    two.accepted_per_position, two.decode_seconds = [0, 0, 0], 1.0
    summary.add_job(replace(DEFAULTS, job_id="1", result=one))
    summary.add_job(replace(DEFAULTS, job_id="2", result=two))
    assert summary.exit_code == 0
    summary.add_job(replace(DEFAULTS, job_id="3", error=InputError("no")))
    summary.add_job(replace(DEFAULTS, job_id="4", error=RequestError("no")))
    assert (summary.prompts, summary.failed, summary.exit_code) == (4, 2, 3)
    assert (summary.prompt_tokens, summary.completion_tokens, summary.steps) == (7, 9, 4)
    assert summary.acceptance_length == 1 + 3 / 4 and summary.acceptance_rate == 3 / 16
    assert summary.accepted_per_position == [2, 1, 0] and summary.acceptance_rate_per_position == [0.5, 0.25, 0.0]
    assert summary.decode_tokens_per_second == pytest.approx((6 + 1) / 3.0)
    assert summary.tokens_per_second == pytest.approx(9 / summary.wall_seconds)


def test_figures_of_nothing() -> None:
    values = RunSummary().as_dict()
    assert values["acceptance_length"] is None and values["tokens_per_second"] is None
    assert values["acceptance_rate_per_position"] == []


def test_positions_that_are_not_known_for_one_request_are_not_known_for_all() -> None:
    """TensorRT-LLM may merge responses; the rates of the other requests' positions would be too low."""
    total = SpecDecodingStats()
    undrafted = SpecDecodingStats(steps=4)
    known = SpecDecodingStats(steps=3, drafted_tokens=6, accepted_tokens=3, accepted_per_position=[2, 1])
    for part in (undrafted, known):
        total.add(part)
    assert total.accepted_per_position == [2, 1] and total.acceptance_length == 1 + 3 / 7
    total.add(SpecDecodingStats(steps=2, drafted_tokens=4, accepted_tokens=2))
    assert total.accepted_per_position == total.acceptance_rate_per_position == []
    total.add(known)
    assert total.accepted_per_position == [] and total.acceptance_rate == 8 / 16
