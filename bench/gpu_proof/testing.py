"""The tests on the GPU: each result is kept when it comes; a test that hangs or crashes leaves the others to run."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_proof.processes import ROOT, run_process
from gpu_proof.recorder import Record, read_record
from gpu_proof.stages import STARTS, Context, Outcome

# What a test may take; then the process that runs it is ended.
TEST_SECONDS = 30
# What an environment may lack: (the name of the module, of the plugin or package).
OPTIONAL = ("pytest_benchmark", "xdist", "hypothesis", "matplotlib", "expecttest")


def missing_modules(names: Sequence[str]) -> list[str]:
    """Those that this interpreter cannot find."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def tests_that_import(name: str, tests: Path) -> list[Path]:
    """The test files that cannot be read without a module."""
    pattern = re.compile(rf"^(?:from|import) {re.escape(name)}\b", re.MULTILINE)
    return sorted(path for path in tests.rglob("test_*.py") if pattern.search(path.read_text(encoding="utf-8")))


def pytest_command(
    missing: Sequence[str], processors: int, record: Path, tests: Path, marks: str
) -> tuple[list[str], list[str]]:
    """The command for the tests with these marks that this environment can run, and what is left out."""
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["-p", "gpu_proof.recorder", f"--record={record}", f"--test-seconds={TEST_SECONDS}", "-m", marks]
    notes = []
    if "pytest_benchmark" in missing:
        command += ["-o", "addopts=-ra --strict-markers --strict-config --import-mode=importlib"]
    if "xdist" not in missing and processors >= 4:
        command += ["-n", str(min(8, processors // 2)), "--max-worker-restart=16"]
    for name in ("hypothesis", "matplotlib"):
        for path in tests_that_import(name, tests) if name in missing else []:
            command += [f"--ignore={path}"]
            notes.append(f"{path.relative_to(tests.parent)} did not run: {name} is not installed")
    if "expecttest" in missing:  # torch.library.opcheck imports it
        command += ["-k", "not opcheck"]
        notes.append("the tests with opcheck did not run: expecttest is not installed")
    return command, notes


def counts_of(record: Record) -> dict[str, Any]:
    """How many tests ended how, which failed, and why others were skipped."""
    outcomes = Counter(entry["outcome"] for entry in record.values())
    return {
        "passed": outcomes["passed"],
        "failures": {name: entry["message"] for name, entry in record.items() if entry["outcome"] == "failed"},
        "unfinished": [name for name, entry in record.items() if entry["outcome"] == "started"],
        "skips": dict(Counter(entry["message"] for entry in record.values() if entry["outcome"] == "skipped")),
    }


def run_marked(context: Context, name: str, marks: str) -> tuple[Record, list[str], str | None, str]:
    """The tests with these marks, in as many processes as it takes."""
    record, log = context.work / f"{name}.jsonl", context.work / f"{name}.log"
    for path in (record, log):
        path.unlink(missing_ok=True)
    processors = 1 if "streams" in name else os.cpu_count() or 1
    # On the emulated GPU the tests have a command of their own, which takes minutes: here those of one file will do.
    tests = ROOT / "tests" / "baselines" / "test_post_hoc.py" if context.emulated else ROOT / "tests"
    command, notes = pytest_command(missing_modules(OPTIONAL), processors, record, tests, marks)
    environment = context.environment(ALPHAEXT_REQUIRE_GPU="1")
    fault, tail, lost = None, "", 0
    for _ in range(STARTS):
        ran = run_process(command, context.left(), environment, log, context.progress(lambda: counts_of(read_record(record))))
        counts, tail = counts_of(read_record(record)), ran.tail
        if ran.timed_out or ran.left_behind:
            fault = ran.fault("pytest")
        elif len(counts["unfinished"]) > lost:  # it died: on behind the test in which it did
            lost = len(counts["unfinished"])
            continue
        elif ran.returncode not in (0, 1, 5) and not counts["failures"]:
            fault = ran.fault("pytest")
        break
    return read_record(record), notes, fault, tail


def run_tests(context: Context) -> Outcome:
    """The GPU tests, which fail rather than be skipped; those that ask for several streams last and apart."""
    if missing_modules(["pytest"]):
        return Outcome("pytest is not installed")
    context.work.mkdir(parents=True, exist_ok=True)
    gpu = "not streams" if context.all_tests else "gpu and not streams"
    record, notes, fault, tail = run_marked(context, "tests", gpu)
    if context.emulated is None and context.left() > 0:
        apart, _, fault_apart, tail_apart = run_marked(context, "tests-streams", "streams")
        record, fault, tail = {**record, **apart}, fault or fault_apart, tail or tail_apart
    counts = counts_of(record)
    message = f"{counts['passed']} passed"
    notes += [f"failed: {name}: {text}" for name, text in list(counts["failures"].items())[:20]]
    notes += [f"skipped {number}: {reason}" for reason, number in counts["skips"].items()]
    outcome = Outcome(message=message, notes=notes, result=counts, tail=tail)
    if counts["failures"]:
        outcome.failed = f"{len(counts['failures'])} failed; {message}"
    elif fault and "ran out of time" in fault:
        outcome.incomplete = f"{fault}; {message}"
    elif fault or counts["unfinished"]:
        ended_in = f"a process ended in {counts['unfinished'][0]}" if counts["unfinished"] else fault
        outcome.failed = f"{ended_in}; {message}"
    elif not counts["passed"]:
        outcome.failed = "no test ran on the GPU"
    return outcome
