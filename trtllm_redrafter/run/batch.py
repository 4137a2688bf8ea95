"""Run jobs on an engine; they come back in the order in which they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from trtllm_redrafter.backends.base import Request, Runner, Update
from trtllm_redrafter.errors import InputError, RedrafterError, RequestError
from trtllm_redrafter.run.jobs import Job


def run_jobs(
    runner: Runner,
    jobs: Iterable[Job],
    *,
    one_by_one: bool,
    on_update: Callable[[Job, Update], None] | None = None,
) -> Iterator[Job]:
    """Run jobs and yield each with its result or error as it finishes; `on_update` sees every step's text.

    `one_by_one` finishes each job before the next starts, so that streamed texts do not interleave. Otherwise the
    runner's own queue decides, and jobs are read no further ahead than it can use.
    """
    ahead = 1 if one_by_one else 2 * runner.info.max_batch_size
    running: dict[str, Job] = {}
    try:
        yield from _run(runner, iter(jobs), running, ahead, on_update)
    finally:
        for request_id in running:  # whoever stopped listening, or an error: nothing stays queued
            runner.cancel(request_id)


def _run(
    runner: Runner,
    waiting: Iterator[Job],
    running: dict[str, Job],
    ahead: int,
    on_update: Callable[[Job, Update], None] | None,
) -> Iterator[Job]:
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < ahead:
            job = next(waiting, None)
            if job is None:
                exhausted = True
            elif job.error is not None or not _submit(runner, job, running):
                yield job
        updates, failed = _step(runner, running) if running else ([], None)
        for update in updates:
            job = running[update.request_id]
            if on_update is not None:
                on_update(job, update)
            if update.result is not None:
                del running[update.request_id]
                job.result = update.result
                yield job if update.result.error is None else job.failed(update.result.error)
        if failed is not None:
            yield failed


def _step(runner: Runner, running: dict[str, Job]) -> tuple[list[Update], Job | None]:
    """A step; an error that names one request fails its job alone, and the others go on."""
    try:
        return runner.step(), None
    except RedrafterError as error:
        job = running.pop(error.problem.where or "", None)
        if job is None:
            raise
        return [], job.failed(error)


def _submit(runner: Runner, job: Job, running: dict[str, Job]) -> bool:
    """False when the job was refused; its error says why."""
    try:
        request_id = runner.submit(Request(runner.encode(job.prompt), job.sampling, draft=job.draft))
    except (RequestError, InputError) as error:
        job.failed(error)
        return False
    except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        # A prompt that a tokenizer or this program stumbles over costs its own line, not the batch.
        why = f"{type(error).__name__}: {error}"[:500]
        job.error = RequestError(
            "the prompt cannot be run", where=job.where, why=why, remedy="report it with the prompt"
        )
        return False
    running[request_id] = job
    return True
