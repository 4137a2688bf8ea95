"""Reports are well-formed, hold everything themselves, and JSON comes back as it was written."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.benchmark.made import batch_records, record, result
from trtllm_redrafter.benchmark.figures import side_figures
from trtllm_redrafter.benchmark.plots import log_ticks
from trtllm_redrafter.benchmark.records import BatchRecords, read_result
from trtllm_redrafter.benchmark.report import draw_plots, render_html, render_markdown, render_text, write_report
from trtllm_redrafter.benchmark.statistics import Bootstrap
from trtllm_redrafter.benchmark.summary import MULTI_TURN, BenchSummary, spec_bench_row, summarize
from trtllm_redrafter.errors import InputError, OutputError

VOID = {"meta", "br", "link", "img", "input", "hr", "path", "use", "rect", "circle", "line"}


class Checker(HTMLParser):
    """Every tag is closed in order, ids are unique, and links stay on the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "srcset", "data"):
                self.targets.append(value or "")


def check_page(html: str) -> None:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open and html.startswith("<!DOCTYPE html>")
    assert len(checker.ids) == len(set(checker.ids))
    assert all(t.startswith("#") and t[1:] in checker.ids for t in checker.targets)
    used = re.findall(r"url\(#([^)]+)\)", html)
    assert used and all(name in checker.ids for name in used)
    assert not re.search(r"https?://|//[a-z]|@import|<script|<link", html)


@pytest.fixture(scope="module")
def summary() -> BenchSummary:
    made = result(batch_records(1.4, noise=0.05), batch_records(0.8, batch=4, noise=0.05, seed=1))
    return summarize(made, Bootstrap(300, 0.95, 0))


def test_html_is_well_formed_and_alone(summary: BenchSummary) -> None:
    html = render_html(summary, draw_plots(summary))
    check_page(html)
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert html.count("<svg") == 5 and "bench &lt;engine&gt; &amp; more" in html
    assert "Batch 1: go" in html and "Batch 4: no-go" in html
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", html)  # every placeholder colour was replaced


def test_markdown_and_text_show_the_same_figures(summary: BenchSummary) -> None:
    markdown, text = render_markdown(summary, draw_plots(summary)), render_text(summary)
    speed = f"{summary.batches[0].figures.speedup.value:.2f}"
    assert speed in markdown and speed in text and "no-go" in text and "| kind of prompt " in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_files_round_trip(summary: BenchSummary, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    write_report(summary, folder, overwrite=False)
    names = {f.name for f in folder.iterdir()}
    drawings = {"speedup.svg", "kinds.svg", "latency.svg", "acceptance.svg", "roof.svg"}
    assert names == drawings | {"report.html", "report.md", "result.json", "manifest.json"}
    for name in drawings:
        assert f"({name})" in (folder / "report.md").read_text()
        tree = ElementTree.parse(folder / name)
        assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg" and tree.getroot().get("viewBox")
    again = read_result(folder)
    assert summarize(again, summary.bootstrap).batches[0].figures.speedup == summary.batches[0].figures.speedup
    assert again.batches[1].drafting.records == summary.result.batches[1].drafting.records
    with pytest.raises(OutputError, match="exists already"):
        write_report(summary, folder, overwrite=False)


def test_json_has_no_nan_and_an_interrupted_page_says_so() -> None:
    short = summarize(
        result(batch_records(1.2, prompts=1, repeats=1), BatchRecords(4), complete=False), Bootstrap(100, 0.95, 0)
    )
    json.dumps(short.file_dict(), allow_nan=False)
    html = render_html(short, draw_plots(short))
    check_page(html)
    assert "interrupted" in html and "not significant" in html
    check = summarize(result(complete=False), Bootstrap(100, 0.95, 0))
    assert "interrupted" in render_html(check, draw_plots(check)) and "interrupted" in render_text(check)


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"kind": "benchmark", "schema": 99}')
    with pytest.raises(InputError, match="this version reads"):
        read_result(file)
    file.write_text('{"kind": "benchmark", "schema": 1, "batches": [{}]}')
    with pytest.raises(InputError, match="damaged"):
        read_result(file)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.9, 12, [1, 2, 5, 10]), (0.5, 60, [0.5, 1, 2, 5, 10, 20, 50]), (3, 30, [5, 10, 20]),
        (0.01, 1000, [0.01, 0.1, 1, 10, 100, 1000]), (1, 3.2, [1, 1.5, 2, 2.5, 3]), (97, 104, [98, 100, 102, 104]),
    ],
)  # fmt: skip
def test_ticks_of_a_logarithmic_axis(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == ticks


def test_every_tick_of_the_latencies_has_its_number(summary: BenchSummary) -> None:
    svg = next(plot.svg for plot in draw_plots(summary) if plot.name == "latency")
    marks = re.findall(r'id="latency-xtick_\d+"', svg)
    assert marks and len(marks) == len(re.findall(r'id="latency-xtick_\d+">.*?<text', svg, flags=re.S))


def test_a_category_is_a_name_and_no_formula() -> None:
    made = batch_records(1.4, noise=0.05)
    for side in (made.drafting, made.autoregression):
        side.records = [record(r.item, r.repeat, r.seconds, category=r"$\frac$ & <b>") for r in side.records]
    shown = summarize(result(made), Bootstrap(100, 0.95, 0))
    html = render_html(shown, draw_plots(shown))
    check_page(html)
    assert html.count(r"$\frac$") >= 2 and "<b>\n" not in html


def test_spec_bench_counts_questions_by_task() -> None:
    """Two turns of a question: 300 tokens in 2 s and 4 s. Then 100 in 1 s, 2 s; a translation, 100 in 2 s, 2 s."""
    made = batch_records(1.0, prompts=0)
    cases = [("81-turn-1", "writing", 100, 1.0, 2.0), ("81-turn-2", "writing", 200, 1.0, 2.0),
             ("x-turn-y", "stem", 100, 1.0, 2.0), ("x", "translation", 100, 2.0, 2.0)]  # fmt: skip
    for item, category, tokens, mine, plain in cases:
        made.drafting.records.append(record(item, 0, mine, tokens=tokens, category=category, accepted=25))
        made.autoregression.records.append(record(item, 0, plain, tokens=tokens, category=category))
    row = spec_bench_row(made)
    assert row is not None
    assert row.tokens_per_second == pytest.approx((150 + 100 + 50) / 3)
    assert row.baseline_tokens_per_second == pytest.approx((75 + 50 + 50) / 3)
    assert row.speedup == pytest.approx(300 / 175) and row.acceptance_length == pytest.approx(1.5)
    assert row.tasks == {MULTI_TURN: pytest.approx((150 + 100) / (75 + 50)), "translation": pytest.approx(1.0)}
    for side in (made.drafting, made.autoregression):  # another file's categories stay its own
        side.records.append(record("z", 0, 1.0, category="my own"))
    row = spec_bench_row(made)
    assert row is not None and set(row.tasks) == {"writing", "stem", "translation", "my own"}


def test_results_of_earlier_versions_are_read() -> None:
    """Their records have `drafted`, `accepted` and `accepted_at`; the published measurement is one."""
    folder = Path(__file__).parents[2] / "benchmarks/results/bench-smollm2"
    values = json.loads((folder / "result.json").read_text())
    found = side_figures(read_result(folder).batches[0].drafting)
    assert found.acceptance_length == pytest.approx(values["summary"][0]["drafting"]["acceptance_length"])
    assert found.acceptance_rate_per_position == pytest.approx(values["summary"][0]["drafting"]["accepted_share"])
