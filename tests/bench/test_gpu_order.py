"""bench/gpu.py from its first stage to its last on the emulated GPU, at one small size, with stand-ins for NVIDIA's tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import emulated_gpu
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not emulated_gpu.DIRECTORY:
    pytest.skip("needs the emulated GPU", allow_module_level=True)

# Runs the program that it is given, as the real one does, and finds nothing.
SANITIZER = """#!/bin/sh
if [ "$1" = --version ]; then echo "Version 2025.3.1"; exit 0; fi
while [ "$1" != "${1#--}" ]; do shift 2; done
"$@"; code=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $code
"""
PROFILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "Version 2025.3.1.0"; exit 0; fi
while [ "$1" != "${1#--}" ]; do shift 2; done
"$@" || exit 1
echo "  void alphaext::cuda::head_forward_kernel<float>(Params) (264, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0"
echo "    Duration                         us       210.14"
"""
NVCC = "#!/bin/sh\necho 'release 13.0, V13.0.88'\n"


@pytest.fixture
def run(tmp_path):
    """Runs the command; returns its exit code and its report."""

    def run_command(*arguments: str, tools: bool = True, **variables: str) -> tuple[int, dict]:
        place = tmp_path / "bin"
        place.mkdir(exist_ok=True)
        for name, text in {"compute-sanitizer": SANITIZER, "ncu": PROFILER, "nvcc": NVCC}.items() if tools else []:
            (place / name).write_text(text)
            (place / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, str(BENCH / "gpu.py"), "--directory", str(tmp_path / "out"), "--commit", "abc", *arguments]
        command += ["--work", str(tmp_path / "work")]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
        assert len(list((tmp_path / "out").iterdir())) <= 8, finished.stderr
        page = (tmp_path / "out" / "gpu-emulated-gpu.md").read_text()
        report = json.loads((tmp_path / "out" / "gpu-emulated-gpu.json").read_text())
        for stage in report["stages"]:
            assert f"| {stage['name']} | {stage['status']} |" in page
        return finished.returncode, report

    return run_command


def statuses(report: dict) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in report["stages"]}


def test_the_whole_order_runs_through(run):
    code, report = run()
    problems = [(stage["name"], stage["message"], stage["tail"]) for stage in report["stages"] if stage["status"] != "passed"]
    assert problems == [] and code == 0
    assert list(statuses(report)) == [
        *("preflight", "build", "smoke", "core", "tests", "sanitizers", "profile", "large", "training", "peers", "compiled")
    ]


def test_a_kernel_that_hangs_costs_its_case(run):
    # A launch of each process never ends: its case is lost, and the ones behind it are still seen.
    code, report = run("--stage", "smoke", SHIM_HANGS="60")
    (smoke,) = report["stages"]
    parts = list(smoke["result"]["parts"].values())
    lost = [number for number, part in enumerate(parts) if part["status"] == "failed"]
    assert code == 1 and smoke["status"] == "failed" and lost
    assert {parts[number]["error"] for number in lost} == {"it did not end within 15 s"}
    assert any(part["status"] == "done" for part in parts[lost[0] + 1 :])


def test_a_build_that_fails_leaves_a_report(run, tmp_path):
    elsewhere = str(tmp_path / "not built")
    these = ["--stage", "preflight", "--stage", "build", "--stage", "core"]
    code, report = run(*these, ALPHAEXT_EMULATED_GPU=elsewhere, CXX="false")
    assert code == 1 and statuses(report) == {"preflight": "passed", "build": "failed", "core": "skipped"}


def test_tools_that_are_missing_are_named(run):
    code, report = run("--stage", "preflight", "--stage", "sanitizers", "--stage", "profile", tools=False)
    assert code == 1 and set(statuses(report).values()) == {"incomplete"}
    (preflight, sanitizers, profile) = report["stages"]
    assert any(note.startswith("ncu was not found") for note in preflight["notes"])
    assert sanitizers["message"].startswith("compute-sanitizer was not found")
    assert profile["message"].startswith("ncu was not found")
