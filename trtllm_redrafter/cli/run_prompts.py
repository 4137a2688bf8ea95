"""Show a batch of prompts being answered: what `run` does, and the last stage of `pipeline`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from trtllm_redrafter.backends.base import EngineInfo, Runner, Update
from trtllm_redrafter.cli.console import note, progress_bar, say, say_generated, working
from trtllm_redrafter.errors import OutputError, RedrafterError, RequestError, UsageError
from trtllm_redrafter.paths import check_place
from trtllm_redrafter.prompts.jsonl import check_source
from trtllm_redrafter.run.batch import run_jobs
from trtllm_redrafter.run.jobs import Job, Outcome, prompt_jobs, read_jobs
from trtllm_redrafter.run.results import ResultsFile
from trtllm_redrafter.run.session import defaults_for, open_runner
from trtllm_redrafter.run.summary import Summary
from trtllm_redrafter.settings import Resolved
from trtllm_redrafter.settings.schema import RunSection


@dataclass(frozen=True)
class RunRequest:
    """What to run and what to show. `quiet` leaves texts to the JSON document."""

    resolved: Resolved
    verify_hashes: bool
    stream: bool
    stats: bool
    overwrite: bool
    resume: bool
    quiet: bool


@dataclass
class RunReport:
    """What ran, for the JSON document."""

    info: EngineInfo
    summary: Summary
    output: Path | None
    kept: int = 0
    """Results of an earlier run that the output had already."""
    outcomes: list[Outcome] = field(default_factory=list)
    error: RedrafterError | None = None
    """The first prompt's that failed."""

    def as_dict(self) -> dict[str, Any]:
        engine = {k: getattr(self.info, k) for k in ("path", "backend", "device", "dtype")}
        results = None if self.output is not None else [outcome.as_dict() for outcome in self.outcomes]
        return {
            "ok": self.error is None,
            "error": None if self.error is None else self.error.as_dict(),
            "engine": engine,
            "output": self.output,
            "kept": self.kept,
            "summary": self.summary.as_dict(),
            "results": results,
        }


def run_prompts(wanted: RunRequest) -> RunReport:
    """Everything a user can get wrong is refused before the engine is loaded."""
    run = wanted.resolved.recipe.run
    check_files(run, overwrite=wanted.overwrite or wanted.resume)
    with ExitStack() as stack:
        file = None
        if run.output is not None:
            how = {"resume": wanted.resume, "overwrite": wanted.overwrite}
            file = stack.enter_context(ResultsFile.open(run.output, **how))
        with working("loading the engine"):
            runner = open_runner(wanted.resolved, verify_hashes=wanted.verify_hashes)
        stack.callback(runner.close)
        for text in runner.notes:
            note(f"note: {text}")
        report = RunReport(runner.info, Summary(), run.output)
        _answer(wanted, runner, report, file)
        if runner.drafter_error is not None:
            note(f"note: steps went undrafted; texts are right\n  why: {runner.drafter_error.render()}")
    _show(wanted, report)
    return report


def _answer(wanted: RunRequest, runner: Runner, report: RunReport, file: ResultsFile | None) -> None:
    """All prompts through the engine, into the file or the report."""
    run, defaults = wanted.resolved.recipe.run, defaults_for(wanted.resolved, runner)
    jobs: Iterable[Job | Outcome] = prompt_jobs(run.prompts, defaults)
    if run.input is not None:
        jobs = chain(jobs, read_jobs(run.input, defaults))
    if file is not None:
        jobs = file.missing(jobs, runner.info)
    on_update = _stream_text if wanted.stream and not wanted.quiet else None
    with nullcontext() if wanted.stream or wanted.quiet else progress_bar() as progress:
        for outcome in run_jobs(runner, jobs, one_by_one=wanted.stream, on_update=on_update):
            report.summary.add(outcome)
            if progress is not None:
                progress("run", report.summary.prompts, None, "prompts")
            _keep(outcome, report, file)
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


def _keep(outcome: Outcome, report: RunReport, file: ResultsFile | None) -> None:
    """Write a result as it comes; hold it in memory only when no file takes it."""
    if file is None:
        report.outcomes.append(outcome)
    else:
        file.write(outcome)
    if outcome.error is not None:
        report.error = report.error or outcome.error
        note(outcome.error.render())


def _show(wanted: RunRequest, report: RunReport) -> None:
    if not wanted.quiet and not wanted.stream and report.output is None:
        for outcome in sorted(report.outcomes, key=_in_order):
            if outcome.result is not None:
                if report.summary.prompts > 1:
                    say(f"--- {outcome.job_id}")
                say_generated(outcome.result.text)
    if not wanted.quiet and report.output is not None:
        done = report.summary.prompts - report.summary.failed
        kept = f", {report.kept} were there already" if report.kept else ""
        say(f"{done} results written to {report.output}{kept}" + _failures(report.summary))
    if wanted.stats and not wanted.quiet:
        say(stats_table(report))


def _in_order(outcome: Outcome) -> tuple[str, int]:
    """prompt-2 before prompt-10; ids of the user's own in their alphabet."""
    stem, _, number = outcome.job_id.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (outcome.job_id, 0)


def _failures(summary: Summary) -> str:
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
        lines.append(("tokens/step", f"{s.acceptance_length:.2f}"))
    if s.acceptance_rate is not None:
        lines.append(
            ("accepted", f"{s.accepted_tokens} of {s.drafted_tokens} drafted, {100 * s.acceptance_rate:.1f} %")
        )
        shares = "  ".join(f"{j}: {100 * share:.0f} %" for j, share in enumerate(s.accepted_share, start=1))
        lines.append(("by position", shares))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _rate(value: float | None, unit: str) -> str:
    return "not measured" if value is None else f"{value:.1f} {unit}"
