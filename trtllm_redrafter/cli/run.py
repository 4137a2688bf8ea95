"""`run`: prompts through an engine, to the terminal, to a JSONL file, or both; also the last stage of `pipeline`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from trtllm_redrafter.backends.base import EngineInfo, Runner, Update
from trtllm_redrafter.cli.console import emit, note, progress_bar, say, say_generated, working
from trtllm_redrafter.cli.options import Json, flag, flags, with_settings
from trtllm_redrafter.errors import InputError, OutputError, RedrafterError, RequestError, UsageError
from trtllm_redrafter.paths import check_place
from trtllm_redrafter.prompts.jsonl import check_source
from trtllm_redrafter.run.jobs import Job, RunSummary, prompt_jobs, read_jobs
from trtllm_redrafter.run.results import ResultsFile
from trtllm_redrafter.run.session import defaults_for, open_runner, run_jobs
from trtllm_redrafter.settings import Layer, Resolved, flag_layers, resolve
from trtllm_redrafter.settings.schema import RunSection

_MOST_STDIN = 16 << 20
"""Bytes of a prompt on standard input."""


@with_settings(
    flag("engine", required=True),
    *flags(
        "run",
        prompts="--prompt",
        stop_token_ids="--stop-token-id",
        skip_special_tokens="--skip-special-tokens/--keep-special-tokens",
    ),
    flag("chat_template_kwargs"),
    flag("tensorrt_llm.api"),
    flag("tensorrt.executor"),
)
def run(
    given: list[Layer],
    verify: Annotated[bool, typer.Option("--verify", help="Check the hashes of the engine's files first.")] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Show text as it is written, prompt by prompt. (default: one prompt, on a terminal)",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show speed and acceptance afterwards.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output file.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the results that --output has already, and write the others.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run prompts on an engine."""
    resolved = resolve(given)
    if resolved.origins["run.prompts"].kind == "flag" and "-" in resolved.recipe.run.prompts:
        resolved = resolve([*given, *_from_stdin(resolved.recipe.run)])
    asked = resolved.recipe.run
    if stream is None:
        stream = len(asked.prompts) == 1 and asked.input is None and not as_json and sys.stdout.isatty()
    if resume and (overwrite or asked.output is None):
        what = "--resume continues a file, --overwrite replaces it" if overwrite else "--resume needs an --output"
        raise UsageError(what, remedy="leave one of them out" if overwrite else "name the file to continue")
    report = run_prompts(
        resolved, verify_hashes=verify, stream=stream, stats=stats, overwrite=overwrite, resume=resume, quiet=as_json
    )
    if as_json:
        emit("run", **report.as_dict())
    if report.summary.exit_code:
        raise typer.Exit(report.summary.exit_code)


def _from_stdin(run: RunSection) -> list[Layer]:
    """The prompts with the text on standard input in place of `-`."""
    if run.prompts.count("-") > 1 or (run.input is not None and str(run.input) in ("-", "/dev/stdin")):
        raise UsageError("standard input is asked for twice", remedy="pass --prompt - once, and --input another file")
    text = sys.stdin.buffer.read(_MOST_STDIN + 1)
    if len(text) > _MOST_STDIN:
        raise InputError("the prompt is too long", where="standard input", why=f"over {_MOST_STDIN >> 20} MiB")
    try:
        prompt = text.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError("the prompt is no text", where="standard input", why=str(error), remedy="use UTF-8") from error
    return flag_layers({"run.prompts": ("--prompt", [prompt if p == "-" else p for p in run.prompts])})


@dataclass
class RunReport:
    """What ran, for the JSON document."""

    info: EngineInfo
    summary: RunSummary
    output: Path | None
    kept: int = 0
    """Results of an earlier run that the output had already."""
    jobs: list[Job] = field(default_factory=list)
    error: RedrafterError | None = None
    """That of the first prompt that failed."""

    def as_dict(self) -> dict[str, Any]:
        engine = {k: getattr(self.info, k) for k in ("path", "backend", "device", "dtype")}
        results = None if self.output is not None else [job.as_dict() for job in self.jobs]
        return {
            "ok": self.error is None,
            "error": None if self.error is None else self.error.as_dict(),
            "engine": engine,
            "output": self.output,
            "kept": self.kept,
            "summary": self.summary.as_dict(),
            "results": results,
        }


def run_prompts(
    resolved: Resolved,
    *,
    verify_hashes: bool = False,
    stream: bool = False,
    stats: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> RunReport:
    """Everything a user can get wrong is refused before the engine is loaded. `quiet`: texts only in the document."""
    run = resolved.recipe.run
    check_files(run, overwrite=overwrite or resume)
    with ExitStack() as stack:
        file = None
        if run.output is not None:
            file = stack.enter_context(ResultsFile.open(run.output, resume=resume, overwrite=overwrite))
        with working("loading the engine"):
            runner = open_runner(resolved, verify_hashes=verify_hashes)
        stack.callback(runner.close)
        for text in runner.notes:
            note(f"note: {text}")
        report = RunReport(runner.info, RunSummary(), run.output)
        _answer(resolved, runner, report, file, stream=stream, quiet=quiet)
        if runner.drafter_error is not None:
            note(f"note: steps went undrafted; texts are right\n  why: {runner.drafter_error.render()}")
    if not quiet:
        _show(report, texts=not stream)
        if stats:
            say(stats_table(report))
    return report


def _answer(
    resolved: Resolved, runner: Runner, report: RunReport, file: ResultsFile | None, *, stream: bool, quiet: bool
) -> None:
    """Run all prompts; results go into the file, else into the report."""
    run, defaults = resolved.recipe.run, defaults_for(resolved, runner)
    jobs: Iterable[Job] = prompt_jobs(run.prompts, defaults)
    if run.input is not None:
        jobs = chain(jobs, read_jobs(run.input, defaults))
    if file is not None:
        jobs = file.missing(jobs, runner.info)
    on_update = _stream_text if stream and not quiet else None
    with nullcontext() if stream or quiet else progress_bar() as progress:
        for job in run_jobs(runner, jobs, one_by_one=stream, on_update=on_update):
            report.summary.add_job(job)
            if progress is not None:
                progress("run", report.summary.prompts, None, "prompts")
            _keep(job, report, file)
    if file is not None:
        file.finish()
        report.kept = file.kept


def check_files(run: RunSection, *, overwrite: bool) -> None:
    """Refuse prompts that are not there, and an output that may not be written."""
    if not run.prompts and run.input is None:
        raise RequestError("the list of prompts is empty", remedy="pass --prompt TEXT or --input FILE.jsonl")
    if run.input is not None:
        check_source(run.input)
    if run.output is None:
        return
    check_place(run.output)
    if not run.output.exists():
        return
    if not overwrite:
        remedy = "pass --overwrite to replace it, or another --output"
        raise OutputError("the output exists already", where=run.output, remedy=remedy)
    if run.output.is_dir():
        raise OutputError("the output is a directory", where=run.output, remedy="name a file, such as results.jsonl")
    if run.input is not None and run.output.samefile(run.input):
        why = "writing the results would erase the prompts that are still to be read"
        raise UsageError("--output is the file of --input", where=run.output, why=why, remedy="name another --output")


def _keep(job: Job, report: RunReport, file: ResultsFile | None) -> None:
    """Write a result as it comes; hold it in memory only when no file takes it."""
    if file is None:
        report.jobs.append(job)
    else:
        file.write(job)
    if job.error is not None:
        report.error = report.error or job.error
        note(job.error.render())


def _show(report: RunReport, *, texts: bool) -> None:
    if texts and report.output is None:
        for job in sorted(report.jobs, key=_in_order):
            if job.error is None and job.result is not None:
                if report.summary.prompts > 1:
                    say(f"--- {job.job_id}")
                say_generated(job.result.text)
    if report.output is not None:
        done = report.summary.prompts - report.summary.failed
        kept = f", {report.kept} were there already" if report.kept else ""
        say(f"{done} results written to {report.output}{kept}" + _failures(report.summary))


def _in_order(job: Job) -> tuple[str, int]:
    """prompt-2 before prompt-10; other ids alphabetically."""
    stem, _, number = job.job_id.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (job.job_id, 0)


def _failures(summary: RunSummary) -> str:
    return f", {summary.failed} failed" if summary.failed else ""


def _stream_text(job: Job, update: Update) -> None:
    say_generated(update.text, end=update.result is not None)


def stats_table(report: RunReport) -> str:
    """Speed and acceptance, one line each; what does not apply is left out."""
    s, info = report.summary, report.info
    shape = info.draft_shape
    lines = [
        ("engine", f"{info.backend}, {info.device}, {info.dtype}"),
        (
            "drafts",
            "none" if shape is None or not s.drafted_tokens else f"{shape.num_beams} beams x {shape.draft_len} tokens",
        ),
        ("prompts", f"{s.prompts}" + _failures(s)),
        ("tokens", f"{s.prompt_tokens} read, {s.completion_tokens} written in {s.wall_seconds:.2f} s"),
        ("speed", _rate(s.tokens_per_second, "tokens/s over everything")),
        ("decoding", _rate(s.decode_tokens_per_second, "tokens/s per request")),
    ]
    if s.acceptance_length is not None:
        lines.append(("acceptance", f"{s.acceptance_length:.2f} tokens per step"))
    if s.acceptance_rate is not None:
        lines.append(
            ("accepted", f"{s.accepted_tokens} of {s.drafted_tokens} drafted, {100 * s.acceptance_rate:.1f} %")
        )
        rates = enumerate(s.acceptance_rate_per_position, start=1)
        shares = "  ".join(f"{j}: {100 * rate:.0f} %" for j, rate in rates)
        if shares:  # positions may be unknown
            lines.append(("by position", shares))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _rate(value: float | None, unit: str) -> str:
    return "not measured" if value is None else f"{value:.1f} {unit}"
