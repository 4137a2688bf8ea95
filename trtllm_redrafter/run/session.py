"""Open an engine as a recipe's `run` section asks for, and run jobs on it.

runner = open_runner(resolved, verify_hashes=False)
for job in run_jobs(runner, prompt_jobs(texts, defaults_for(resolved, runner)), one_by_one=False): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trtllm_redrafter.backends import load_backend, torch_device
from trtllm_redrafter.backends.base import Request, Runner, Update
from trtllm_redrafter.backends.engine_config import TENSORRT_STEPS, TORCH, read_engine_config
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.names import ENGINE_CHECKPOINT
from trtllm_redrafter.errors import InputError, RedrafterError, RequestError, UsageError
from trtllm_redrafter.prompts.messages import Prompt
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.run.jobs import Job
from trtllm_redrafter.run.options import asked_draft_shape, require, sampling_params
from trtllm_redrafter.settings.layers import Resolved


def open_runner(resolved: Resolved, *, verify_hashes: bool) -> Runner:
    """Load the recipe's engine with the backend it was built for."""
    require(resolved, {"engine": "--engine"}, "a run")
    engine, run = resolved.recipe.engine, resolved.recipe.run
    assert engine is not None
    config = read_engine_config(engine)
    backend = config.backend
    if not resolved.is_default("backend") and resolved.recipe.backend != backend:
        raise UsageError(
            f"the engine was built for the {backend} backend",
            where=engine,
            why=f"{resolved.recipe.backend} was asked for ({resolved.origins['backend'].render()})",
            remedy=f"use --backend {backend}, or build an engine for {resolved.recipe.backend}",
        )
    shape = asked_draft_shape(resolved, config.draft_shape)
    if shape is not None:
        _check_horizon(engine, shape)
    device = torch_device(run.device) if backend == TORCH else run.device  # a TensorRT engine finds its GPUs itself
    return load_backend(backend).load(
        config, device=device, verify_hashes=verify_hashes, draft_shape=shape, api=_chosen_api(resolved, backend)
    )


def _chosen_api(resolved: Resolved, backend: str) -> str | None:
    """None: as the engine was built. For another backend, a recipe's key is ignored, and a flag is an error."""
    if backend == TENSORRT_STEPS:
        return resolved.recipe.tensorrt.executor
    is_flag = resolved.origins["tensorrt_llm.api"].kind == "flag"
    return resolved.recipe.tensorrt_llm.api if is_flag or backend != TORCH else None


def defaults_for(resolved: Resolved, runner: Runner) -> Job:
    """A job without a text: the recipe's defaults. Chat is on if the engine has a template, unless the recipe says."""
    run = resolved.recipe.run
    chat = runner.has_chat_template if run.chat is None else run.chat
    prompt = Prompt("", chat=chat, template_kwargs=resolved.recipe.chat_template_kwargs)
    return Job("", "", prompt, sampling_params(resolved), run.draft)


def _check_horizon(engine: Path, shape: DraftShape) -> None:
    """`UsageError` for drafts longer than the drafter was trained for, which the checkpoint's manifest says."""
    manifest = Manifest.find(engine / ENGINE_CHECKPOINT)
    trained = None if manifest is None else manifest.trained_draft_len
    if trained is not None and shape.draft_len > trained:
        raise UsageError(
            f"draft_len is {shape.draft_len}",
            where="--draft-len",
            why=f"the drafter was trained for {trained}",
            remedy=f"use at most {trained}",
        )


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
        for request_id in running:  # the caller has stopped, or an error occurred: nothing stays queued
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
    """A step; an error that names one request fails only its job, and the others continue."""
    try:
        return runner.step(), None
    except RedrafterError as error:
        job = running.pop(error.problem.where or "", None)
        if job is None:
            raise
        return [], job.failed(error)


def _submit(runner: Runner, job: Job, running: dict[str, Job]) -> bool:
    """False if the job was refused; its error says why."""
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
