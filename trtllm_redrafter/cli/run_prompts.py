"""Show a batch of prompts being answered: what `run` does, and the last stage of `pipeline`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from trtllm_redrafter.backends.base import EngineInfo, Update
from trtllm_redrafter.cli.console import note, progress_bar, say, say_generated, working
from trtllm_redrafter.errors import OutputError, RedrafterError, RequestError, UsageError
from trtllm_redrafter.fsio import as_output_error
from trtllm_redrafter.generation import (
    Job,
    Outcome,
    Summary,
    defaults_for,
    open_runner,
    prompt_jobs,
    read_jobs,
    run_jobs,
)
from trtllm_redrafter.prompts.jsonl import check_source, dump_line
from trtllm_redrafter.recipe import Resolved
from trtllm_redrafter.recipe.schema import RunSection


@dataclass(frozen=True)
class RunRequest:
    """What to run and what to show. `quiet` leaves texts to the JSON document."""

    resolved: Resolved
    verify_hashes: bool
    stream: bool
    stats: bool
    overwrite: bool
    quiet: bool


@dataclass
class RunReport:
    """What ran, for the JSON document."""

    info: EngineInfo
    summary: Summary
    output: Path | None
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
            "summary": self.summary.as_dict(),
            "results": results,
        }


def run_prompts(wanted: RunRequest) -> RunReport:
    """Everything a user can get wrong is refused before the engine is loaded."""
    run = wanted.resolved.recipe.run
    check_files(run, overwrite=wanted.overwrite)
    with working("loading the engine"):
        runner = open_runner(wanted.resolved, verify_hashes=wanted.verify_hashes)
    try:
        defaults = defaults_for(wanted.resolved, runner)
        jobs = chain(prompt_jobs(run.prompts, defaults), () if run.input is None else read_jobs(run.input, defaults))
        report = RunReport(runner.info, Summary(), run.output)
        with ExitStack() as stack:
            sink = None if run.output is None else stack.enter_context(_open_sink(run.output))
            show_bar = not wanted.stream and not wanted.quiet
            progress = stack.enter_context(progress_bar()) if show_bar else None
            on_update = _stream_text if wanted.stream and not wanted.quiet else None
            for outcome in run_jobs(runner, jobs, one_by_one=wanted.stream, on_update=on_update):
                report.summary.add(outcome)
                if progress is not None:
                    progress("run", report.summary.prompts, None, "prompts")
                _keep(outcome, report, sink)
    finally:
        runner.close()
    _show(wanted, report)
    return report


def check_files(run: RunSection, *, overwrite: bool) -> None:
    """Refuse prompts that are not there, and an output that may not be written."""
    if not run.prompts and run.input is None:
        raise RequestError("the list of prompts is empty", remedy="pass --prompt TEXT or --input FILE.jsonl")
    if run.input is not None:
        check_source(run.input)
    if run.output is None or not run.output.exists():
        return
    if not overwrite:
        remedy = "pass --overwrite to replace it, or another --output"
        raise OutputError("the output exists already", where=run.output, remedy=remedy)
    if run.output.is_dir():
        raise OutputError("the output is a directory", where=run.output, remedy="name a file, such as results.jsonl")
    if run.input is not None and run.output.samefile(run.input):
        why = "writing the results would erase the prompts that are still to be read"
        raise UsageError("--output is the file of --input", where=run.output, why=why, remedy="name another --output")


def _keep(outcome: Outcome, report: RunReport, sink: IO[str] | None) -> None:
    """Write a result as it comes; hold it in memory only when no file takes it."""
    if sink is None:
        report.outcomes.append(outcome)
    else:
        sink.write(dump_line(outcome.as_dict()) + "\n")
        sink.flush()
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
        say(f"{done} results written to {report.output}" + _failures(report.summary))
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


@contextmanager
def _open_sink(path: Path) -> Iterator[IO[str]]:
    """Results are written as they come, so that a killed run leaves what it had finished; an empty file goes."""
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("w", encoding="utf-8") as sink:
                yield sink
        except BaseException:
            if path.stat().st_size == 0:
                path.unlink()
            raise


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
