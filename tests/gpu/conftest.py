"""Tests marked `own_process` run in a process each, so that one cannot take the GPU or MPI from the others.

A failed test keeps its frames, and with them whatever engine it held; an executor that has once been loaded has
initialised MPI for the life of its process; and a fault in the C++ library ends the process. The child is an ordinary
pytest run of one test. It writes its reports to a file, which the parent hands on as its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtllm_redrafter.backends.tensorrt_llm.child import end_group

REPORTS = "REDRAFTER_TEST_REPORTS"
"""In a child: where its reports go."""

SHARED = "REDRAFTER_TEST_SHARED"
"""A directory for what one test makes and others use, such as engines; removed at the end of the whole run."""

SECONDS = 1800.0
"""Unless the mark says otherwise: own_process(seconds=60)."""

_LAST_WORDS = 6000
_config: pytest.Config | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config
    config.addinivalue_line("markers", "own_process: runs in a process of its own")
    if SHARED not in os.environ:
        os.environ[SHARED] = tempfile.mkdtemp(prefix="redrafter-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if REPORTS in os.environ or item.get_closest_marker("own_process") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _run_alone(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In a child: keep the report. In the parent this is where the report goes on to the terminal."""
    if REPORTS in os.environ and _config is not None:
        values = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        with Path(os.environ[REPORTS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _run_alone(item: pytest.Item) -> Iterator[pytest.TestReport]:
    """The child's reports; one more when it died or did not end."""
    with tempfile.TemporaryDirectory() as folder:
        reports, log = Path(folder, "reports"), Path(folder, "log")
        reports.touch()
        how = _wait(item, reports, log)
        words = log.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:]
        finished = False
        for line in reports.read_text(encoding="utf-8").splitlines():
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=json.loads(line))
            if isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)  # a skip's place and reason, which JSON has as a list
            finished = finished or report.when == "teardown"
            report.sections.append(("what the test's process wrote", words))
            yield report
        if not finished:
            yield pytest.TestReport(
                item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", f"{how}\n{words}", "call"
            )


def _wait(item: pytest.Item, reports: Path, log: Path) -> str:
    """Run the test; how its process ended, in words."""
    plugin = ["-p", __name__] if item.config.pluginmanager.has_plugin(__name__) else []  # else found as conftest.py
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", *plugin, item.nodeid]
    mark = item.get_closest_marker("own_process")
    seconds = SECONDS if mark is None else float(mark.kwargs.get("seconds", SECONDS))
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command, cwd=item.config.rootpath, env=os.environ | {REPORTS: str(reports)}, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            return f"the test's process ended with exit code {child.wait(seconds)}"
        except subprocess.TimeoutExpired:
            return f"the test's process was ended after {seconds:.0f} seconds"
        finally:
            end_group(child)
