"""What bench/gpu.py makes of the tests, of compute-sanitizer and of ncu: what they print, and what they leave out."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not (BENCH / "gpu.py").is_file():
    pytest.skip("the tests of the benchmarks need the source tree", allow_module_level=True)

from gpu_proof import preflight, profiling, sanitizers, testing  # noqa: E402
from gpu_proof.processes import Finished  # noqa: E402
from gpu_proof.recorder import read_record  # noqa: E402
from gpu_proof.stages import Context  # noqa: E402


@pytest.fixture
def context(tmp_path):
    return Context({"gpu": "Test GPU", "capability": "9.0"}, time.monotonic() + 90, tmp_path / "work")


# ---- The tests -------------------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_left_out_and_said(tmp_path):
    tests = tmp_path / "tests"
    (tests / "head").mkdir(parents=True)
    (tests / "head" / "test_a.py").write_text("from hypothesis import given\n")
    (tests / "test_b.py").write_text("import torch\n")
    command, notes = testing.pytest_command([], 16, tmp_path / "x", tests, "gpu")
    joined = " ".join(command)
    assert notes == [] and "-n 8" in joined and "-o" not in command and "-m gpu" in joined
    assert "--test-seconds=30" in command and "--continue-on-collection-errors" in command
    missing = ["pytest_benchmark", "xdist", "hypothesis", "expecttest"]
    command, notes = testing.pytest_command(missing, 16, tmp_path / "x", tests, "gpu")
    assert f"--ignore={tests / 'head' / 'test_a.py'}" in command and "not opcheck" in command and "-n" not in command
    assert any(part.startswith("addopts=") and "benchmark" not in part for part in command)
    assert notes == [
        "tests/head/test_a.py did not run: hypothesis is not installed",
        "the tests with opcheck did not run: expecttest is not installed",
    ]
    assert testing.missing_modules(["json", "no_such_module"]) == ["no_such_module"]


TESTS = """import ctypes, os, pytest
pytestmark = pytest.mark.gpu
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skipped(): pytest.skip("needs two GPUs")
def test_hangs(): ctypes.PyDLL(None).pause()  # as a driver may: the interpreter's lock is held
def test_behind(): pass
def test_crashes(): os.abort()
def test_last(): pass
@pytest.mark.streams
def test_of_streams(): pass
"""


@pytest.fixture
def some_tests(tmp_path, monkeypatch):
    """Tests of which one hangs and one crashes, in place of the package's."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text("")
    (tests / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n    streams: x\n")
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(testing, "TEST_SECONDS", 2)
    return tests


@pytest.mark.parametrize("processors", [1, 4], ids=["one process", "workers"])
def test_each_result_is_kept_and_the_rest_runs(context, some_tests, monkeypatch, processors):
    if processors > 1:
        pytest.importorskip("xdist")
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    (some_tests / "test_broken.py").write_text("import no_such_module\n")
    outcome = testing.run_tests(context)
    record = {**read_record(context.work / "tests.jsonl"), **read_record(context.work / "tests-streams.jsonl")}
    outcomes = {name.rpartition("::")[2] or name: entry["outcome"] for name, entry in record.items()}
    for name in ("test_passes", "test_behind", "test_last", "test_of_streams"):
        assert outcomes[name] == "passed"
    assert outcomes["test_fails"] == "failed" and outcomes["test_skipped"] == "skipped"
    # A worker's death is its test's failure; where there are no workers, the test has begun and not ended.
    assert outcomes["test_hangs"] == outcomes["test_crashes"] == ("started" if processors == 1 else "failed")
    assert outcome.result["passed"] == 4 and outcome.result["skips"] == {"needs two GPUs": 1}
    assert "failed; 4 passed" in str(outcome.failed)
    assert any("test_broken.py: cannot be read" in note for note in outcome.notes)


def test_streams_run_last_and_apart(context, monkeypatch):
    marks: list[str] = []

    def run(command, limit, environment, log, poll=None):
        marks.append(command[command.index("-m", 3) + 1])
        assert environment["ALPHAEXT_REQUIRE_GPU"] == "1"
        return Finished(5, "")

    monkeypatch.setattr(testing, "run_process", run)
    assert testing.run_tests(context).failed == "no test ran on the GPU"
    assert marks == ["gpu and not streams", "streams"]
    context.all_tests = True
    testing.run_tests(context)
    assert marks[2:] == ["not streams", "streams"]


def test_tests_that_time_cuts_short(context, monkeypatch):
    def run(command, limit, environment, log, poll=None):
        record = Path(next(part for part in command if part.startswith("--record=")).removeprefix("--record="))
        if "streams" not in record.name:
            record.write_text('{"test": "a", "outcome": "passed", "message": ""}\n{"test": "b", "outc')
        return Finished(-9, "", True)

    monkeypatch.setattr(testing, "run_process", run)
    outcome = testing.run_tests(context)
    assert outcome.failed is None and outcome.incomplete == "pytest ran out of time; 1 passed"


# ---- Sanitizers ------------------------------------------------------------------------------------------------------


def test_finds_programs(tmp_path):
    name = "compute-sanitizer"
    assert preflight.find_program(name, {"PATH": str(tmp_path)}, tmp_path)[0] is None
    for place in ("usr/local/cuda/compute-sanitizer", "home/bin", "path"):
        program = tmp_path / place / name
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    assert preflight.find_program(name, {"PATH": ""}, tmp_path)[0] == tmp_path / "usr/local/cuda/compute-sanitizer" / name
    environment = {"PATH": "", "CUDA_HOME": str(tmp_path / "home")}
    assert preflight.find_program(name, environment, tmp_path)[0] == tmp_path / "home/bin" / name
    environment["PATH"] = str(tmp_path / "path")
    assert preflight.find_program(name, environment, tmp_path)[0] == tmp_path / "path" / name


def test_missing_tools_leave_their_stages_incomplete(context, monkeypatch):
    for module in (sanitizers, profiling):
        monkeypatch.setattr(module, "find_program", lambda name, environment: (None, ["PATH", "/usr/local/cuda"]))
    assert sanitizers.run_sanitizers(context).incomplete == "compute-sanitizer was not found (looked at PATH, /usr/local/cuda)"
    assert profiling.run_profile(context).incomplete == "ncu was not found (looked at PATH, /usr/local/cuda)"


CLEAN = "========= COMPUTE-SANITIZER\n122 parts, 0 wrong\n========= ERROR SUMMARY: 0 errors\n"
OUT_OF_BOUNDS = """========= COMPUTE-SANITIZER
CASE one
CASE several blocks, torch.float32
========= Invalid __global__ read of size 4 bytes
=========     at void alphaext::cuda::mix_forward_kernel<float>(alphaext::MixParams)+0x50
=========     by thread (0,0,0) in block (0,0,0)
=========     Host Frame: main [0x1] in a.out
=========
========= ERROR SUMMARY: 1 error
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at alphaext::cuda::k(int)+0x50 and Read access at alphaext::cuda::k(int)
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
FOREIGN = OUT_OF_BOUNDS.replace("Invalid", "Uninitialized").replace("alphaext::", "at::native::")
FOREIGN = FOREIGN.replace("in a.out", "in /checkout/alphaext/_C.so")


@pytest.mark.parametrize(
    ("tool", "ran", "fault", "incomplete", "notes"),
    [
        ("memcheck", Finished(0, CLEAN), None, None, 0),
        ("memcheck", Finished(0, OUT_OF_BOUNDS), "memcheck: 1 findings, the first: Invalid __global__ read", None, 1),
        ("memcheck", Finished(-9, OUT_OF_BOUNDS[:-40], True), "memcheck: 1 findings, the first: Invalid", None, 1),
        ("racecheck", Finished(0, RACE), "racecheck: 1 findings, the first: Error: Race reported", None, 1),
        ("initcheck", Finished(0, FOREIGN), None, None, 1),
        ("memcheck", Finished(0, FOREIGN), "memcheck counts 1 findings", None, 1),
        ("initcheck", Finished(0, CLEAN.replace("0 errors", "3 errors")), "could not be read", None, 0),
        ("synccheck", Finished(1, CLEAN), "the program under it ended with code 1", None, 0),
        ("synccheck", Finished(0, "122 cases"), "synccheck printed no summary", None, 0),
        ("synccheck", Finished(-9, CLEAN, True), None, "synccheck ran out of time after 7 cases, no finding so far", 0),
    ],
)
def test_judges_the_sanitizers(tool, ran, fault, incomplete, notes):
    found, cut, texts = sanitizers.judge(tool, ran, "7 cases", {})
    assert len(texts) == notes and cut == incomplete
    assert found is None if fault is None else fault in str(found)


def test_a_finding_names_its_case():
    (finding,) = sanitizers.read_findings(OUT_OF_BOUNDS).ours
    assert finding.endswith("; in the case several blocks, torch.float32")


def test_only_initcheck_watches_every_kernel_and_each_tool_has_its_cases():
    for tool in sanitizers.TOOLS:
        command = sanitizers.sanitizer_command(Path("compute-sanitizer"), tool, ["python", Path("a.py")])
        assert command[-2:] == ["python", "a.py"] and command[1:3] == ["--tool", tool]
        assert ("kernel_substring=alphaext" in command) is (tool != "initcheck")
    assert sanitizers.TOOLS["memcheck"] == []
    assert "one launch" in sanitizers.TOOLS["initcheck"] and "products apart" not in sanitizers.TOOLS["initcheck"]
    for tool in ("racecheck", "synccheck"):
        assert set(sanitizers.TOOLS[tool]) == {"--only", "torch.float32", "torch.bfloat16"}


def test_a_planted_fault_that_is_not_found_fails_the_tool(context, monkeypatch):
    monkeypatch.setattr(sanitizers, "find_program", lambda name, environment: (Path("compute-sanitizer"), []))
    monkeypatch.setattr(sanitizers, "compile_probe", lambda *arguments: Path("probe"))

    def run(command, limit, environment=None, log=None, poll=None):
        planted = "probe" in command
        return Finished(0, OUT_OF_BOUNDS if planted and "racecheck" not in command else CLEAN)

    monkeypatch.setattr(sanitizers, "run_process", run)
    outcome = sanitizers.run_sanitizers(context)
    assert outcome.failed == "racecheck did not find the fault that was planted for it"
    assert outcome.result["memcheck"].startswith("clean (0 cases")
    monkeypatch.setattr(sanitizers, "compile_probe", lambda *arguments: "no nvcc")
    outcome = sanitizers.run_sanitizers(context)
    assert outcome.failed is None and outcome.notes == ["the tools were not tried on planted faults: no nvcc"]


def test_findings_are_told_while_a_tool_runs(tmp_path):
    (tmp_path / "log").write_text(OUT_OF_BOUNDS)
    assert sanitizers.so_far(tmp_path / "gone.json", tmp_path / "log") == "0 cases so far, 1 findings"


# ---- The profiler ----------------------------------------------------------------------------------------------------

PROFILE = """==PROF== Connected to process 1 (/usr/bin/python3)
CASE dense, float32, forward
  void alphaext::cuda::head_forward_kernel<float>(alphaext::Params) (264, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    DRAM Frequency                  Ghz         3.20
    Memory Throughput                 %        91.25
    Duration                         us       210.14
    Compute (SM) Throughput           %        33.05
    ----------------------- ----------- ------------
    Section: Memory Workload Analysis
    Memory Throughput        Tbyte/s         4.11
    Registers Per Thread             register/thread             128
CASE training, an epoch
  alphaext::cuda::train_kernel(TrainRunsParams, TrainPlan) (68, 1, 1)x(512, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         ms         0.21
"""


def test_reads_what_the_profiler_prints():
    assert profiling.read_profile(PROFILE) == [
        {
            "case": "dense, float32, forward",
            "kernel": "head_forward_kernel<float>",
            "memory %": 91.25,
            "us": 210.14,
            "compute %": 33.05,
            "registers": 128.0,
        },
        {"case": "training, an epoch", "kernel": "train_kernel", "us": 210.0},
    ]


@pytest.mark.parametrize(
    ("ran", "failed", "incomplete"),
    [
        (Finished(0, PROFILE), None, None),
        (Finished(0, "==ERROR== LibraryNotLoaded"), "ncu printed no kernel; 0 launches", None),
        (Finished(9, PROFILE), "ncu ended with code 9; 2 launches", None),
        (Finished(-9, PROFILE, True), None, "ncu ran out of time; 2 launches"),
    ],
)
def test_a_profile_that_is_cut_short_or_fails(context, monkeypatch, ran, failed, incomplete):
    def run(command, limit, environment, log, poll):
        assert command[1:3] == ["--clock-control", "none"]  # the card is shared
        context.work.mkdir(exist_ok=True)
        log.write_text(ran.output)
        return ran

    monkeypatch.setattr(profiling, "run_process", run)
    monkeypatch.setattr(profiling, "find_program", lambda name, environment: (Path("ncu"), []))
    outcome = profiling.run_profile(context)
    assert (outcome.failed, outcome.incomplete) == (failed, incomplete)
    profiling.write_text(context.work, context.work / "copy.txt")
    assert (context.work / "copy.txt").read_text() == ran.output
