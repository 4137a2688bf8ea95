"""Run jobs on an engine; outcomes come in the order in which they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from trtllm_redrafter.backends.base import Request, Runner, Update
from trtllm_redrafter.errors import RedrafterError, RequestError
from trtllm_redrafter.generation.jobs import Job, Outcome


def run_jobs(
    runner: Runner,
    jobs: Iterable[Job | Outcome],
    *,
    one_by_one: bool,
    on_update: Callable[[Job, Update], None] | None = None,
) -> Iterator[Outcome]:
    """Run jobs and yield outcomes as they finish; `on_update` sees every step's text.

    `one_by_one` finishes each job before the next starts, so that streamed texts do not interleave. Otherwise the
    runner's own queue decides, and jobs are read no further ahead than it can use.
    """
    ahead = 1 if one_by_one else 2 * runner.info.max_batch_size
    waiting = iter(jobs)
    running: dict[str, Job] = {}
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < ahead:
            job = next(waiting, None)
            if job is None:
                exhausted = True
            elif isinstance(job, Outcome):
                yield job
            else:
                refused = _submit(runner, job, running)
                if refused is not None:
                    yield refused
        for update in runner.step() if running else ():
            job = running[update.request_id]
            if on_update is not None:
                on_update(job, update)
            if update.result is not None:
                del running[update.request_id]
                error = update.result.error
                yield Outcome(job.job_id, job.where, result=update.result) if error is None else _failed(job, error)


def _submit(runner: Runner, job: Job, running: dict[str, Job]) -> Outcome | None:
    try:
        token_ids = runner.encode_prompt(job.prompt, chat=job.chat)
        request_id = runner.submit(Request(token_ids, job.sampling, draft=job.draft))
    except RequestError as error:
        return _failed(job, error)
    running[request_id] = job
    return None


def _failed(job: Job, error: RedrafterError) -> Outcome:
    """The error with the job's own place in the input."""
    problem = error.problem
    named = type(error)(problem.what, where=job.where, why=problem.why, remedy=problem.remedy, problems=error.problems)
    return Outcome(job.job_id, job.where, error=named)
