"""A benchmark's report: tables as text and Markdown, one HTML page with plots, and JSON.

write_report(summary, Path("report"), overwrite=False)     # report.html, report.md, *.svg, result.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_redrafter.benchmark import page, plots
from trtllm_redrafter.benchmark.figures import SideFigures
from trtllm_redrafter.benchmark.records import DRAFTING, SIDES
from trtllm_redrafter.benchmark.summary import BatchSummary, BenchSummary
from trtllm_redrafter.fsio import CREATOR, atomic_directory, write_json

TITLE = "Drafting against autoregression"
DEFINITIONS = (
    "Speeds count emitted token ids. Speed-up is end to end, from submission to the last token, over the same prompts; "
    "the interval is a paired bootstrap over prompts and repeats. Updates are what a stream's reader sees: with "
    "drafting, one brings several tokens. The step-time ratio is a drafting step's time over a plain one's: "
    "the acceptance length (tokens per step) from which drafting pays."
)

Rows = list[list[str]]


def number(value: float | None, form: str = ".1f", scale: float = 1.0) -> str:
    """A figure, or a dash if it was not measured."""
    return "–" if value is None or value != value else format(scale * value, form)


SPEED_HEADER = ["batch", "side", "together", "tokens/s", "per user", "decoding", "first token p50, ms", "p95",
                "update p50, ms", "p95", "p99", "step, ms"]  # fmt: skip
PAYS_HEADER = ["batch", "speed-up", "interval", "decoding", "all tokens", "acceptance length", "step-time ratio",
               "same output", "of roof, plain", "drafting"]  # fmt: skip
CATEGORY_HEADER = ["kind of prompt", "batch", "prompts", "speed-up", "interval", "acceptance length", "step-time ratio",
                   "per user", "undrafted", "update p95, ms", "undrafted"]  # fmt: skip


def speed_rows(summary: BenchSummary) -> Rows:
    return [
        [str(b.figures.batch), name, *_speed(b.figures.drafting if name == DRAFTING else b.figures.autoregression)]
        for b in summary.batches
        for name in SIDES
    ]


def _speed(side: SideFigures) -> list[str]:
    first, gap = side.first_token_seconds, side.gap_seconds
    rates = [side.tokens_per_second, side.user_tokens_per_second, side.decode_tokens_per_second]
    times = [first["p50"], first["p95"], gap["p50"], gap["p95"], gap["p99"], side.step_seconds]
    return [number(side.concurrency), *(number(r) for r in rates), *(number(t, ".1f", 1e3) for t in times)]


def pays_rows(summary: BenchSummary) -> Rows:
    return [_pays(b) for b in summary.batches]


def _pays(b: BatchSummary) -> list[str]:
    f, same = b.figures, b.identity
    return [
        str(f.batch),
        number(f.speedup.value, ".2f"),
        _interval(f.speedup.low, f.speedup.high),
        number(f.decode_speedup.value, ".2f"),
        number(f.total_speedup, ".2f"),
        number(f.drafting.acceptance_length, ".2f"),
        number(f.step_time_ratio, ".2f"),
        f"{same.same} of {same.compared}",
        "–" if b.roof is None else f"{100 * b.roof.plain:.0f} %",
        "–" if b.roof is None else f"{100 * b.roof.drafting:.0f} %",
    ]


def _interval(low: float, high: float) -> str:
    return f"{number(low, '.2f')} to {number(high, '.2f')}"


def category_rows(summary: BenchSummary) -> Rows:
    return [
        [
            name,
            str(b.figures.batch),
            str(c.prompts),
            number(c.speedup.value, ".2f"),
            _interval(c.speedup.low, c.speedup.high),
            number(c.drafting.acceptance_length, ".2f"),
            number(c.step_time_ratio, ".2f"),
            *(number(side.user_tokens_per_second) for side in (c.drafting, c.autoregression)),
            *(number(side.gap_seconds["p95"], ".1f", 1e3) for side in (c.drafting, c.autoregression)),
        ]
        for b in summary.batches
        for name, c in sorted(b.figures.categories.items())
    ]


def fact_rows(summary: BenchSummary) -> list[tuple[str, str]]:
    """How it was measured, as (name, value)."""
    result, env, engine = summary.result, summary.result.environment, summary.result.engine
    machine, clocks, roof = env["machine"], env["clocks"], engine.get("roof") or {}
    rows = [
        ("engine", f"{engine['path']}: {engine['backend']}, {engine['dtype']}, drafts {engine['draft_shape']}"),
        ("machine", f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores; {machine['device']}"),
        ("clock", _clock(clocks)),
        ("load", f"{env['load_before']} before, {env.get('load_after', '–')} after"),
        ("versions", ", ".join(f"{k} {v}" for k, v in env["versions"].items())),
        ("commit", str(env["commit"] or "not a git checkout")),
        ("date", str(env["date"])),
        ("command", str(env["command"])),
        ("settings", ", ".join(f"{k} {v}" for k, v in result.settings.items())),
        ("interval", f"{100 * summary.bootstrap.level:g} %, {summary.bootstrap.draws} draws"),
    ]
    memory = env.get("memory")
    if memory:
        rows.append(("memory", ", ".join(f"{k.replace('_bytes', '').replace('_', ' ')} {v / 1e9:.2f} GB"
                                         for k, v in memory.items())))  # fmt: skip
    if roof.get("bandwidth"):
        text = f"{roof['bandwidth'] / 1e9:.1f} GB/s ({roof['bandwidth_from']}), {roof['weight_bytes'] / 1e6:.0f} MB"
        rows.append(("roof", text + " of base weights per step"))
    return rows


def _clock(clocks: Mapping[str, Any]) -> str:
    text = f"{clocks['mhz'] or '?'} MHz, governor {clocks['governor'] or 'not shown'}"
    for number, found in enumerate(clocks.get("gpus", [])):
        text += f"; GPU {number}: {found['sm_mhz']} of {found['max_sm_mhz']} MHz, memory {found['memory_mhz']} MHz"
    return text


def spec_bench_lines(summary: BenchSummary) -> list[str]:
    """Spec-Bench's figures, at batch 1."""
    found = [b.spec_bench for b in summary.batches if b.spec_bench is not None]
    return [
        "On these prompts, as Spec-Bench counts (greedy, batch 1, mean over questions and repeats): "
        f"speed-up {row.speedup:.2f}, "
        f"{row.tokens_per_second:.1f} against {row.baseline_tokens_per_second:.1f} tokens/s, "
        f"{number(row.acceptance_length, '.2f')} tokens per step. By task: "
        + ", ".join(f"{task} {number(value, '.2f')}" for task, value in row.tasks.items())
        + "."
        for row in found
    ]


def position_lines(summary: BenchSummary) -> list[str]:
    """Share of steps that accept at least 1, 2, ... drafts."""
    shares = {b.figures.batch: b.figures.drafting.acceptance_rate_per_position for b in summary.batches}
    return [
        f"Drafts accepted at batch {batch}: "
        + ", ".join(f"{j} in {100 * s:.0f} %" for j, s in enumerate(found, start=1))
        for batch, found in shares.items()
        if found
    ]


def _interruption(summary: BenchSummary) -> list[str]:
    if summary.result.complete:
        return []
    return ["The measurement was interrupted; what follows was measured before that."]


def render_text(summary: BenchSummary) -> str:
    """For a terminal."""
    parts = [*_interruption(summary), page.markdown_table(SPEED_HEADER, speed_rows(summary)), ""]
    parts += [page.markdown_table(PAYS_HEADER, pays_rows(summary)), ""]
    parts += position_lines(summary) + spec_bench_lines(summary)
    return "\n".join([*parts, *(v.render() for v in summary.verdicts)])


def render_markdown(summary: BenchSummary, drawn: Sequence[Plot]) -> str:
    parts = [f"# {TITLE}", "", *_interruption(summary), *(f"- {v.render()}" for v in summary.verdicts), ""]
    parts += [f"![{plot.caption}: {plot.text}]({plot.name}.svg)" for plot in drawn]
    parts += [
        "",
        page.markdown_table(PAYS_HEADER, pays_rows(summary)),
        "",
        *_paragraphs(position_lines(summary) + spec_bench_lines(summary)),
    ]
    parts += [page.markdown_table(SPEED_HEADER, speed_rows(summary)), "", DEFINITIONS, ""]
    parts += [page.markdown_table(CATEGORY_HEADER, category_rows(summary)), ""]
    parts += ["Measured with:", "", *(f"- {name}: {value}" for name, value in fact_rows(summary)), ""]
    return "\n".join(parts)


def _paragraphs(lines: list[str]) -> list[str]:
    return [text for line in lines for text in (line, "")]


def render_html(summary: BenchSummary, drawn: Sequence[Plot]) -> str:
    engine = summary.result.engine
    lead = (
        f"{engine['path']}, {engine['backend']} on {engine['device']}, {str(summary.result.environment['date'])[:10]}"
    )
    parts = [f"<h1>{TITLE}</h1>", page.paragraph(lead, soft=True)]
    parts += [page.paragraph(text) for text in _interruption(summary)]
    parts += [page.verdict_box(v.answer, f"Batch {v.batch}: {v.answer}", v.reason) for v in summary.verdicts]
    if drawn:
        parts.append(page.plots([(plot.caption, plot.text, plot.svg) for plot in drawn]))
    parts += [page.heading("Does it pay?"), page.table(PAYS_HEADER, pays_rows(summary))]
    parts += [page.paragraph(line) for line in spec_bench_lines(summary)]
    parts += [page.heading("Speed and latency"), page.table(SPEED_HEADER, speed_rows(summary))]
    parts += [page.paragraph(DEFINITIONS, soft=True)]
    parts += [page.heading("By kind of prompt"), page.table(CATEGORY_HEADER, category_rows(summary))]
    parts += [page.heading("How it was measured"), page.facts(fact_rows(summary))]
    return page.page(TITLE, parts)


@dataclass(frozen=True)
class Plot:
    """A plot with its caption and text; `name` is the file's."""

    name: str
    caption: str
    text: str
    svg: str


def draw_plots(summary: BenchSummary) -> list[Plot]:
    """All plots that the measurements allow."""
    if not summary.batches:
        return []
    first = summary.batches[0]
    batch = f"batch {first.figures.batch}"
    interval, waits = "end to end, with its interval; 1 is autoregression", "how long a reader waits for more text"
    found = [
        Plot("speedup", "Speed-up by batch size", interval, plots.speedup_by_batch(summary)),
        Plot("kinds", "Speed-up by kind of prompt", batch, plots.speedup_by_category(first)),
        Plot("latency", "Time between updates", waits, plots.latency_distribution(first, summary)),
    ]
    if first.figures.drafting.acceptance_rate_per_position:
        text = f"{batch}; the acceptance length is 1 plus their sum"
        found.append(Plot("acceptance", "Acceptance by position", text, plots.acceptance_by_position(summary)))
    roof = plots.roofline(summary)
    if roof is not None:
        text = "a step cannot be faster than reading the weights once"
        found.append(Plot("roof", "Under the bandwidth roof", text, roof))
    return found


def write_report(summary: BenchSummary, folder: Path, *, overwrite: bool) -> None:
    """Write the HTML page, the Markdown with its SVG files, and the measurement as JSON."""
    drawn = draw_plots(summary)
    with atomic_directory(folder, overwrite=overwrite) as work:
        write_json(work / "result.json", summary.file_dict())
        (work / "report.md").write_text(render_markdown(summary, drawn), encoding="utf-8")
        (work / "report.html").write_text(render_html(summary, drawn), encoding="utf-8")
        for plot in drawn:
            (work / f"{plot.name}.svg").write_text(page.picture(plot.svg), encoding="utf-8")
        write_json(work / "manifest.json", {"kind": "report", "creator": {"name": CREATOR}})
