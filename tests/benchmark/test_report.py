"""Reports are well-formed, hold everything themselves, and JSON comes back as it was written."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.benchmark.made import batch_records, result
from trtllm_redrafter.benchmark.records import BatchRecords, read_result
from trtllm_redrafter.benchmark.report import draw_plots, render_html, render_markdown, render_text, write_report
from trtllm_redrafter.benchmark.statistics import Bootstrap
from trtllm_redrafter.benchmark.summary import Summary, summarize
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
def summary() -> Summary:
    made = result(batch_records(1.4, noise=0.05), batch_records(0.8, batch=4, noise=0.05, seed=1))
    return summarize(made, Bootstrap(300, 0.95, 0))


def test_html_is_well_formed_and_alone(summary: Summary) -> None:
    html = render_html(summary, draw_plots(summary))
    check_page(html)
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert html.count("<svg") == 5 and "bench &lt;engine&gt; &amp; more" in html
    assert "Batch 1: go" in html and "Batch 4: no-go" in html
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", html)  # every placeholder colour was replaced


def test_markdown_and_text_show_the_same_figures(summary: Summary) -> None:
    markdown, text = render_markdown(summary, draw_plots(summary)), render_text(summary)
    speed = f"{summary.batches[0].figures.speedup.value:.2f}"
    assert speed in markdown and speed in text and "no-go" in text and "| kind of prompt |" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_files_round_trip(summary: Summary, tmp_path: Path) -> None:
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
