"""A pytest plugin that writes each test's result when it has ended, and leaves out tests that the file holds already.

    pytest -p gpu_proof.recorder --record FILE --test-seconds 30

A test that takes longer ends its process, even where it waits for a driver that does not come back and holds the interpreter's
lock, which pytest-timeout cannot do. A line of FILE is JSON:

    {"test": ..., "outcome": "started" | "passed" | "failed" | "skipped", "message": ...}
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

Record = dict[str, dict[str, str]]


def read_record(path: Path) -> Record:
    """The last line about each test; of those that started and did not end, "started"."""
    record: Record = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return record
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line, if the process died while it wrote
            continue
        record[entry.pop("test")] = entry
    return record


class Recorder:
    """Writes what happens; under pytest-xdist the workers' reports come to the one process that has this."""

    def __init__(self, path: Path) -> None:
        self.known = set(read_record(path))
        self.file = path.open("a", encoding="utf-8")
        self.ended: set[str] = set()

    def write(self, test: str, outcome: str, message: str = "") -> None:
        self.file.write(json.dumps({"test": test, "outcome": outcome, "message": message[:300]}) + "\n")
        self.file.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(nodeid, "started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.ended:
            return
        if report.failed or report.skipped or report.when == "teardown":
            outcome = "passed" if report.passed else report.outcome
            self.ended.add(report.nodeid)
            self.write(report.nodeid, outcome, "" if report.passed else message_of(report.longrepr))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid, "failed", f"cannot be read: {message_of(report.longrepr)}")


def message_of(longrepr: Any) -> str:
    """The last line of a failure, or the reason of a skip."""
    if isinstance(longrepr, tuple):
        return str(longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else longrepr).strip().partition("\n")[0]


_stderr: list[int] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Watch over a test by a thread that needs no lock."""
    seconds = item.config.getoption("--test-seconds")
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=_stderr[-1])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="where each test's result is written")
    parser.addoption("--test-seconds", type=float, default=0.0, help="what a test may take before its process is ended")
    _stderr.append(os.dup(2))  # before pytest captures it


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path), "recorder-of-results")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--record")
    if path is None:
        return
    recorder: Any = config.pluginmanager.get_plugin("recorder-of-results")
    known: Iterable[str] = recorder.known if recorder is not None else read_record_of_start(config)
    left_out = [item for item in items if item.nodeid in known]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in known]


def read_record_of_start(config: pytest.Config) -> Iterable[str]:
    """For a worker of pytest-xdist, which must leave out the very tests that the others do: what was known at the start."""
    return config.workerinput["known"]  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker which tests are known."""
    recorder = node.config.pluginmanager.get_plugin("recorder-of-results")
    node.workerinput["known"] = [] if recorder is None else sorted(recorder.known)
