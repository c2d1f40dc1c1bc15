"""bench/gpu.py without a GPU: stages and their time, reports, what tools print, and the measuring code itself on the CPU."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not (BENCH / "gpu.py").is_file():
    pytest.skip("the tests of the benchmarks need the source tree", allow_module_level=True)

import gpu  # noqa: E402
import gpu_heads  # noqa: E402
import gpu_large  # noqa: E402
import gpu_limits  # noqa: E402
import gpu_probe  # noqa: E402
import gpu_report  # noqa: E402
import gpu_small  # noqa: E402
import gpu_timing  # noqa: E402
import gpu_training  # noqa: E402
import training  # noqa: E402
from head.providers import SIZES, Size  # noqa: E402

MACHINE = {"gpu": "Test GPU", "capability": "9.0", "driver": "1", "cuda": "13.0", "torch": "2.11", "commit": "abc"}
TINY = Size("tiny", num_classes=12, num_few=3, pca_dim=4, few_samples=5, top_k=2, in_features=8, batch=4)


@pytest.fixture
def context(tmp_path):
    return gpu.Context(dict(MACHINE), time.monotonic() + 60, tmp_path / "work")


def stage(name: str, function=lambda context: gpu.Outcome(None, "fine"), seconds: float = 1) -> gpu.Stage:
    return gpu.Stage(name, seconds, function, "a stage")


# ---- Stages ----------------------------------------------------------------------------------------------------------


def test_stages_are_the_documented_ones_in_order():
    names = [entry.name for entry in gpu.all_stages()]
    assert names == ["build", "tests", "sanitizers", "limits", "bench", "large", "training"]
    assert gpu.LIMIT_SECONDS < 8 * 60


def test_selection_keeps_the_order():
    stages = gpu.all_stages()
    assert gpu.select(stages, None) == stages
    assert [entry.name for entry in gpu.select(stages, ["bench", "build", "bench"])] == ["build", "bench"]
    with pytest.raises(ValueError, match="there is no stage 'fly'; there are build, tests"):
        gpu.select(stages, ["fly"])


def test_what_a_stage_leaves_over_goes_to_the_next():
    assert gpu.deadlines([stage("a", seconds=10), stage("b", seconds=30)], 100.0, 80.0) == [120.0, 180.0]
    assert gpu.deadlines([stage("a", seconds=10)], 0.0, 400.0) == [400.0]


def test_a_failing_stage_is_reported_and_the_rest_runs(context, capsys):
    def explode(context: gpu.Context) -> gpu.Outcome:
        raise RuntimeError("planted")

    seen: list[int] = []
    stages = [stage("a"), stage("b", explode), stage("c", lambda _: gpu.Outcome("broke", tail="its end")), stage("d")]
    entries = gpu.run_stages(stages, context, 60, lambda so_far: seen.append(len(so_far)))
    assert [entry["status"] for entry in entries] == ["passed", "failed", "failed", "passed"]
    assert entries[1]["message"] == "RuntimeError: planted" and "Traceback" in entries[1]["tail"]
    assert seen == [1, 2, 3, 4]
    printed = capsys.readouterr().out
    assert "b failed in 0 s: RuntimeError: planted" in printed and "    its end" in printed


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path):
    pid_file = tmp_path / "pid"
    program = f"""import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pid_file)!r}, "w").write(str(child.pid))
print("begun", flush=True)
time.sleep(60)"""
    started = time.monotonic()
    finished = gpu.run_process([sys.executable, "-c", program], 2, log=tmp_path / "log")
    assert time.monotonic() - started < 30
    assert finished.timed_out and finished.fault("it") == "it ran out of time"
    assert finished.output == "begun\n" == (tmp_path / "log").read_text()
    child = Path(f"/proc/{pid_file.read_text()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child runs on")


def test_processes_that_fail_or_do_not_start(tmp_path):
    assert gpu.run_process([sys.executable, "-c", "raise SystemExit(3)"], 60).fault("it") == "it ended with code 3"
    assert gpu.run_process([tmp_path / "gone"], 60).returncode == 127
    assert gpu.run_process(["true"], 0).timed_out
    assert gpu.run_process([sys.executable, "-c", "print(1)"], 60).fault("it") is None


# ---- The command -----------------------------------------------------------------------------------------------------


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCH / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=300)


def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path):
    finished = run_command("--directory", str(tmp_path / "results"))
    assert finished.returncode == 2
    assert finished.stderr.startswith("bench/gpu.py needs a GPU, and on this machine there is none to use: torch ")
    assert finished.stdout == "" and not (tmp_path / "results").exists()


def test_list_needs_nothing():
    finished = run_command("--list", "--stage", "limits")
    assert finished.returncode == 0
    assert finished.stdout == "limits      bandwidths, matrix rates and launches of this card\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--stage", "fly"], "there is no stage 'fly'"),
        (["--output", "../x"], "--output must be a name"),
        (["--limit", "0"], "--limit must be positive"),
    ],
)
def test_wrong_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.parse(arguments)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_main_writes_after_each_stage_and_ends_with_1_where_one_failed(tmp_path, monkeypatch, capsys):
    written: list[list[str]] = []

    def look(context: gpu.Context) -> gpu.Outcome:
        report = gpu_report.read_report(tmp_path / "gpu-test-gpu.json")
        written.append([] if report is None else [entry["name"] for entry in report["stages"]])
        return gpu.Outcome("broke" if len(written) == 2 else None)

    monkeypatch.setattr(gpu, "all_stages", lambda: [stage("a", look), stage("b", look), stage("c", look)])
    monkeypatch.setattr(gpu, "describe_machine", lambda context: (dict(MACHINE), ""))
    assert gpu.main(["--directory", str(tmp_path), "--commit", "def"]) == 1
    assert written == [[], ["a"], ["a", "b"]]
    page = (tmp_path / "gpu-test-gpu.md").read_text()
    assert "| b | failed |" in page and "- commit: def" in page
    assert gpu.main(["--directory", str(tmp_path), "--stage", "a"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-test-gpu.json", "gpu-test-gpu.md"]


def test_a_stage_run_alone_keeps_the_others_of_the_same_gpu():
    old = {"machine": MACHINE, "stages": [{"name": "limits", "seconds": 1}, {"name": "bench", "seconds": 2}]}
    new = [{"name": "bench", "seconds": 3}]
    assert gpu_report.merged(old, MACHINE, new)["stages"] == [old["stages"][0], *new]
    assert gpu_report.merged(old, {**MACHINE, "gpu": "another"}, new)["stages"] == new
    assert gpu_report.merged(None, MACHINE, new)["stages"] == new


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "report.json"
    gpu_report.write_whole(path, "old")

    def fail(*_):
        raise OSError("planted")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="planted"):
        gpu_report.write_whole(path, "new")
    assert path.read_text() == "old"
    path.write_text("{half")
    assert gpu_report.read_report(path) is None and gpu_report.read_report(tmp_path / "gone") is None


# ---- The build and the tests -----------------------------------------------------------------------------------------


def pretend(monkeypatch, *outputs: gpu.Finished) -> list[list[str]]:
    """Processes that end as told; returns their commands."""
    commands: list[list[str]] = []
    endings = iter(outputs)

    def run(command, limit, environment=None, log=None):
        commands.append([*map(str, command), *(f"{k}={v}" for k, v in (environment or {}).items() if "CUDA" in k)])
        return next(endings)

    monkeypatch.setattr(gpu, "run_process", run)
    return commands


def test_build_is_for_this_gpu_alone(context, monkeypatch):
    info = {"cuda": "13.0", "cuda_archs": ["9.0"], "compiler": "g++"}
    commands = pretend(monkeypatch, gpu.Finished(0, "", False), gpu.Finished(0, "note\n" + json.dumps(info) + "\n", False))
    outcome = gpu.run_build(context)
    assert outcome.failed is None and outcome.result["kernels_for"] == "9.0"
    assert "TORCH_CUDA_ARCH_LIST=9.0" in commands[0] and "ALPHAEXT_CUDA=1" in commands[0]


@pytest.mark.parametrize(
    ("endings", "complaint"),
    [
        ([gpu.Finished(1, "no nvcc", False)], "setup.py build_ext ended with code 1"),
        ([gpu.Finished(-9, "", True)], "ran out of time"),
        ([gpu.Finished(0, "", False), gpu.Finished(1, "ImportError", False)], "importing what was built ended with code 1"),
        ([gpu.Finished(0, "", False), gpu.Finished(0, '{"cuda": null}', False)], "has no CUDA kernels"),
    ],
)
def test_a_build_that_fails(context, monkeypatch, endings, complaint):
    pretend(monkeypatch, *endings)
    assert complaint in str(gpu.run_build(context).failed)


def test_what_is_not_installed_is_left_out_and_said(tmp_path):
    (tmp_path / "test_a.py").write_text("from hypothesis import given\n")
    (tmp_path / "test_b.py").write_text("import torch\n")
    command, notes = gpu.pytest_command([], 16, tmp_path / "x.xml", tmp_path)
    assert notes == [] and command[-2:] == ["-n", "8"] and "-o" not in command and "-m gpu" in " ".join(command)
    assert "-m gpu" not in " ".join(gpu.pytest_command([], 16, tmp_path / "x.xml", tmp_path, all_tests=True)[0])
    missing = ["pytest_benchmark", "xdist", "hypothesis", "expecttest"]
    command, notes = gpu.pytest_command(missing, 16, tmp_path / "x.xml", tmp_path)
    assert f"--ignore={tmp_path / 'test_a.py'}" in command and "not opcheck" in command and "-n" not in command
    assert any(part.startswith("addopts=") and "benchmark" not in part for part in command)
    assert notes == [
        "tests/test_a.py did not run: hypothesis is not installed",
        "the tests with opcheck did not run: expecttest is not installed",
    ]
    assert gpu.missing_modules(["json", "no_such_module"]) == ["no_such_module"]


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_cuda" name="test_graph"/><testcase classname="tests.test_ops" name="test_a[cuda-1]"/>
<testcase classname="tests.test_ops" name="test_a[cpu-1]"/><testcase classname="tests.test_ops" name="test_d[1-cuda]"/>
<testcase classname="tests.test_cuda_sources" name="test_e[a.cuda.cu]"/>
<testcase classname="tests.test_ops" name="test_b"><failure message="x">y</failure></testcase>
<testcase classname="tests.test_cuda" name="test_c"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""


def test_counts_of_a_test_run(tmp_path):
    (tmp_path / "a.xml").write_text(JUNIT)
    assert gpu.read_junit(tmp_path / "a.xml") == {
        "passed": 5,
        "passed_on_gpu": 3,
        "failures": ["tests.test_ops::test_b"],
        "skips": {"needs two GPUs": 1},
    }
    assert gpu.read_junit(tmp_path / "gone") == {}


def test_no_test_on_the_gpu_is_a_failure(context, monkeypatch):
    pretend(monkeypatch, gpu.Finished(0, "", False))
    monkeypatch.setattr(gpu, "read_junit", lambda path: {"passed": 5, "passed_on_gpu": 0, "failures": [], "skips": {}})
    assert gpu.run_tests(context).failed == "no test ran on the GPU"


# ---- Sanitizers ------------------------------------------------------------------------------------------------------


def test_finds_the_sanitizer(tmp_path):
    assert gpu.find_sanitizer({"PATH": str(tmp_path)}, tmp_path)[0] is None
    for place in ("usr/local/cuda/compute-sanitizer", "home/bin", "path"):
        program = tmp_path / place / "compute-sanitizer"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    assert gpu.find_sanitizer({"PATH": ""}, tmp_path)[0] == tmp_path / "usr/local/cuda/compute-sanitizer/compute-sanitizer"
    environment = {"PATH": "", "CUDA_HOME": str(tmp_path / "home")}
    assert gpu.find_sanitizer(environment, tmp_path)[0] == tmp_path / "home/bin/compute-sanitizer"
    environment["PATH"] = str(tmp_path / "path")
    assert gpu.find_sanitizer(environment, tmp_path)[0] == tmp_path / "path/compute-sanitizer"


def test_a_missing_sanitizer_fails_its_stage(context, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda environment: (None, ["PATH", "/usr/local/cuda"]))
    assert gpu.run_sanitizers(context).failed == "compute-sanitizer was not found (looked at PATH, /usr/local/cuda)"


CLEAN = "========= COMPUTE-SANITIZER\n122 cases on cuda, 0 wrong\n========= ERROR SUMMARY: 0 errors\n"
OUT_OF_BOUNDS = """========= COMPUTE-SANITIZER
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
    ("tool", "ran", "fault", "notes"),
    [
        ("memcheck", gpu.Finished(0, CLEAN, False), None, 0),
        ("memcheck", gpu.Finished(0, OUT_OF_BOUNDS, False), "memcheck: 1 findings, the first: Invalid __global__ read", 1),
        ("racecheck", gpu.Finished(0, RACE, False), "racecheck: 1 findings, the first: Error: Race reported", 1),
        ("initcheck", gpu.Finished(0, FOREIGN, False), None, 1),
        ("memcheck", gpu.Finished(0, FOREIGN, False), "memcheck counts 1 findings", 0),
        ("initcheck", gpu.Finished(0, CLEAN.replace("0 errors", "3 errors"), False), "could not be read", 0),
        ("synccheck", gpu.Finished(1, CLEAN, False), "the program under it ended with code 1", 0),
        ("synccheck", gpu.Finished(0, "122 cases", False), "synccheck printed no summary", 0),
        ("synccheck", gpu.Finished(-9, CLEAN, True), "synccheck ran out of time", 0),
    ],
)
def test_judges_the_sanitizers(tool, ran, fault, notes):
    found, texts = gpu.judge_sanitizer(tool, ran)
    assert len(texts) == notes
    assert found is None if fault is None else fault in str(found)


def test_only_initcheck_watches_every_kernel():
    for tool in gpu.TOOLS:
        command = gpu.sanitizer_command(Path("compute-sanitizer"), tool, ["python", Path("a.py")])
        assert command[-2:] == ["python", "a.py"] and command[1:3] == ["--tool", tool]
        assert ("kernel_substring=alphaext" in command) is (tool != "initcheck")


def test_a_planted_fault_that_is_not_found_fails_the_tool(context, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda environment: (Path("compute-sanitizer"), []))
    monkeypatch.setattr(gpu_probe, "compile_probe", lambda *arguments: Path("probe"))

    def run(command, limit, environment=None, log=None):
        planted = "probe" in command
        return gpu.Finished(0, OUT_OF_BOUNDS if planted and "racecheck" not in command else CLEAN, False)

    monkeypatch.setattr(gpu, "run_process", run)
    outcome = gpu.run_sanitizers(context)
    assert outcome.failed == "racecheck did not find the fault that was planted for it"
    assert outcome.result["memcheck"].startswith("clean")
    monkeypatch.setattr(gpu_probe, "compile_probe", lambda *arguments: "no nvcc")
    outcome = gpu.run_sanitizers(context)
    assert outcome.failed is None and outcome.notes == ["the tools were not tried on planted faults: no nvcc"]


def test_small_cases_are_right_on_the_cpu_and_cover_every_operator(monkeypatch, capsys):
    assert gpu_small.run("cpu", "torch.float32, l1") == 0
    assert " 0 wrong" in capsys.readouterr().out
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("alphaext::")}
    on_gpu = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    assert on_gpu <= {f"alphaext::{name}" for name in gpu_small.COVERED}, "give a new operator its cases in gpu_small.py"

    def wrong(*arguments, **options):
        raise AssertionError("planted")

    monkeypatch.setattr(gpu_small, "assert_close", wrong)
    assert gpu_small.run("cpu", "no samples") == 1
    assert "WRONG: no samples" in capsys.readouterr().out
    assert gpu_small.run("cpu", "nothing is called this") == 1


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_floors():
    size = SIZES["imagenet-lt"]
    weights = 136 * 500 * 3000
    assert gpu_heads.form_of("paper loop") == gpu_heads.form_of("alphaext dense") == "dense"
    assert gpu_heads.form_of("alphaext factored, cached logits") == "cached"
    forward = gpu_heads.bytes_moved(size, 4, "dense", "forward")
    assert 4 * weights < forward < 4.1 * weights
    assert 4 * weights < gpu_heads.bytes_moved(size, 4, "dense", "backward") < 4.1 * weights
    both = gpu_heads.bytes_moved(size, 4, "dense", "forward+backward")
    assert both == forward + gpu_heads.bytes_moved(size, 4, "dense", "backward")
    step = gpu_heads.bytes_moved(size, 4, "dense", "sgd step")
    assert 7 * 4 * weights < step < 7.1 * 4 * weights
    assert 2 * weights < gpu_heads.bytes_moved(size, 2, "dense", "forward") < forward / 1.99
    factored, cached = (gpu_heads.bytes_moved(size, 4, form, "forward") for form in ("factored", "cached"))
    assert factored - cached == 4 * (64 * 2048 + 1000 * 2049 - 64 * 1000)
    # By hand: 3 few of 12 classes, 3 members, 4 hidden, 12 inputs, 8 features, batch 4, in float32.
    w1, b1, w2, b2, z = 3 * 4 * 12, 3 * 4, 3 * 3 * 4, 3 * 3, 3 * 12
    forward = 4 * (w1 + b1 + w2 + b2 + z + 4 * 8 + 12 * 8 + 12 + 4 * 12) + 8 * 9
    assert gpu_heads.bytes_moved(TINY, 4, "dense", "forward") == forward
    backward = 4 * (4 * 12 + 4 * 12 + 2 * 9 + w2 + 3 * 4 + z + w1 + b1 + w2 + b2) + 8 * 9
    assert gpu_heads.bytes_moved(TINY, 4, "dense", "backward") == backward


def test_short_steps_share_a_graph_only_where_their_data_fits_the_cache():
    assert gpu_heads.steps_in_graph(0.01, 10**6, 50 * 10**6) == 40
    assert gpu_heads.steps_in_graph(0.0, 10**6, 50 * 10**6) == gpu_heads.MOST_STEPS
    assert gpu_heads.steps_in_graph(0.01, 30 * 10**6, 50 * 10**6) == 1
    assert gpu_heads.steps_in_graph(0.5, 10**6, 50 * 10**6) == 1


def test_summary_and_turns():
    assert gpu_timing.summarise([3.0, 1.0, 2.0]) == gpu_timing.Times(2.0, 1.0, 3)
    assert gpu_timing.summarise([4.0]) == gpu_timing.Times(4.0, 0.0, 1)
    order: list[str] = []
    tasks = {
        "a": gpu_timing.Task(lambda: order.append("a"), prepare=lambda: order.append("before a")),
        "b": gpu_timing.Task(lambda: time.sleep(0.01), steps=10),
    }
    times = gpu_timing.time_interleaved(tasks, "cpu", rounds=6)
    assert order == ["before a", "a"] * 7  # one to warm up
    assert times["a"].rounds == 6 and 1.0 <= times["b"].median_ms < 5.0
    assert gpu_timing.time_interleaved(tasks, "cpu", rounds=50, budget_seconds=0.0)["b"].rounds == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_runs_on_a_cpu(tmp_path, dtype):
    output = tmp_path / "heads.json"
    providers = [name for name in gpu_heads.PROVIDERS if "compile" not in name]
    options = {"sizes": [TINY], "dtypes": [dtype], "providers": providers, "rounds": 2, "num_bytes": 2**16}
    report = gpu_heads.measure("cpu", output, **options)
    assert json.loads(output.read_text()) == report
    assert [(row["mode"], row["provider"]) for row in report["rows"]] == [(m, p) for m in gpu_heads.MODES for p in providers]
    for row in report["rows"]:
        assert "error" not in row and row["graph"] is None
        assert row["eager"]["median_ms"] > 0 and math.isfinite(row["floor_ms"])
    assert report["score_errors"][f"tiny, {dtype}"] < gpu_heads.TOLERANCES[dtype]
    assert gpu_heads.own_failures(report) == []
    assert "### tiny" in "\n".join(gpu_report.bench_lines(report, {}))


class FakeStream:
    def wait_stream(self, other):
        pass


class FakeEvent:
    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


class FakeGraph:
    replays = 0

    def pool(self):
        return 1

    def replay(self):
        FakeGraph.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    """Enough of torch.cuda for the code around graphs and events to run where there is no GPU; a capture only runs."""
    fakes = {"Stream": FakeStream, "Event": FakeEvent, "CUDAGraph": FakeGraph, "current_stream": FakeStream}
    fakes |= {"stream": lambda stream: contextlib.nullcontext(), "_sleep": lambda cycles: None, "synchronize": lambda: None}
    fakes["graph"] = lambda graph, pool=None, stream=None: contextlib.nullcontext()
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(FakeGraph, "replays", 0)


@pytest.mark.parametrize("mode", gpu_heads.MODES)
def test_the_way_through_graphs_and_events(fake_cuda, mode):
    problem = gpu_heads.make_problem(TINY)
    names = [name for name in gpu_heads.PROVIDERS if "compile" not in name]
    modules = {name: gpu_heads.PROVIDERS[name][0](problem) for name in names}
    options = {"copy_bytes_per_s": 1e9, "cache_bytes": 10**9, "rounds": 5}
    rows = gpu_heads.measure_mode(modules, problem, "float32", mode, "cuda", **options)
    assert [row["provider"] for row in rows] == names
    for entry in rows:
        assert "error" not in entry and entry["graph"]["rounds"] == entry["eager"]["rounds"] == 5
        assert entry["steps_in_graph"] == gpu_heads.MOST_STEPS  # nothing happens in a replay, so it takes no time
    replays = len(names) * (6 + 2 + 6)  # once to find its length, twice to warm up, then the rounds
    assert FakeGraph.replays == replays * (2 if mode == "backward" else 1)  # a forward before every backward


def test_a_peer_that_cannot_be_captured_keeps_its_eager_figure(fake_cuda, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("cannot be captured\nand more")

    monkeypatch.setattr(gpu_heads, "captured", refuse)
    problem = gpu_heads.make_problem(TINY)
    modules = {"paper loop": gpu_heads.PROVIDERS["paper loop"][0](problem)}
    options = {"copy_bytes_per_s": 1e9, "rounds": 2}
    (entry,) = gpu_heads.measure_mode(modules, problem, "float32", "forward", "cuda", **options)
    assert entry["graph"] is None and entry["eager"]["median_ms"] > 0
    assert entry["error"] == "RuntimeError: cannot be captured"


def test_a_provider_that_fails_leaves_the_others_their_figures(monkeypatch):
    def broken(problem):
        raise RuntimeError("planted")

    monkeypatch.setitem(gpu_heads.PROVIDERS, "batched baddbmm", (broken, False))
    providers = ["paper loop", "batched baddbmm", "alphaext factored"]
    options = {"dtypes": ["float32"], "modes": ["forward"], "rounds": 2, "num_bytes": 2**16}
    report = gpu_heads.measure("cpu", None, sizes=[TINY], providers=providers, **options)
    failed = [row for row in report["rows"] if "error" in row]
    assert [row["provider"] for row in failed] == ["batched baddbmm"] and failed[0]["error"] == "RuntimeError: planted"
    assert len(report["rows"]) == 3 and gpu_heads.own_failures(report) == []
    monkeypatch.setattr(gpu_heads, "make_step", broken)
    report = gpu_heads.measure("cpu", None, sizes=[TINY], providers=["alphaext factored"], **options)
    assert len(gpu_heads.own_failures(report)) == 1


def test_large_heads_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv(gpu_large.FUSED_SCORES, "77")
    output, size = tmp_path / "large.json", gpu_large.LargeSize(6, 40, 5, in_features=8, hidden=7)
    report = gpu_large.measure("cpu", output, crossing=[size], large=[size], rounds=2, num_bytes=2**16)
    assert json.loads(output.read_text()) == report and report["errors"] == []
    assert len(report["crossing"]) == len(report["large"]) == 4  # forward and backward in two dtypes
    page = "\n".join(gpu_report.large_lines(report))
    assert "batch 6, 40 classes, 5 few, bfloat16, backward | 240 |" in page and "| ratio |" in page
    assert os.environ[gpu_large.FUSED_SCORES] == "77"


def test_a_large_head_that_fails_leaves_the_others(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_large, "measure_crossing", broken)
    size = gpu_large.LargeSize(6, 40, 5, in_features=8, hidden=7)
    report = gpu_large.measure("cpu", None, crossing=[size], large=[size], dtypes=["float32"], rounds=2, num_bytes=2**16)
    assert len(report["large"]) == 2 and report["errors"] == [f"{size}, float32: RuntimeError: out of memory"]


def test_bytes_of_a_large_head():
    size = gpu_large.LargeSize(batch=2, num_classes=10, num_few=3, in_features=8, hidden=4, top_k=1)
    # Logits and scores; pre-activations, w2, b2; what is kept of them; ids.
    assert gpu_large.bytes_of_large(size, 4)["forward"] == 20 * 8 + (12 + 24 + 6) * 4 + (48 + 48) + 48


def test_large_heads_through_graphs(fake_cuda, monkeypatch):
    make_problem = gpu_large.make_problem
    monkeypatch.setattr(gpu_large, "make_problem", lambda size, device, dtype: make_problem(size, "cpu", dtype))
    size = gpu_large.LargeSize(6, 40, 5, in_features=8, hidden=7)
    rows = gpu_large.measure_crossing(size, "float32", "cuda", 5, 1.0)
    assert [row["mode"] for row in rows] == ["forward", "backward"] and all(row["one_launch_ms"] > 0 for row in rows)


def test_trainings_are_measured(tmp_path):
    output = tmp_path / "training.json"
    tiny = training.Dataset("tiny", 40, 6, 50, 1000, 70, in_features=16, pca_dim=8, top_k=3)
    report = gpu_training.measure("cpu", output, datasets=[tiny], few_classes=[5], repeats=1, epochs=2, seeds=1)
    assert json.loads(output.read_text()) == report
    assert report["trainings"]["tiny"]["steps"] == 4 and report["sweep"]["runs"] == 9 and report["sweep"]["failed"] == []
    page = "\n".join(gpu_report.training_lines(report, {"barrier_launch_graph_us": 3.0}))
    assert "| tiny | 4 |" in page and "to 9 heads" in page and "few classes: 5: " in page


def test_limits_are_measured(tmp_path):
    output = tmp_path / "limits.json"
    limits = gpu_limits.measure("cpu", output, tmp_path, num_bytes=2**18, size=32)
    assert json.loads(output.read_text()) == limits
    assert set(limits) < set(gpu_report.LIMIT_TEXTS)
    assert all(value > 0 for value in limits.values())
    assert "matrix product, TF32" in "\n".join(gpu_report.limit_lines(limits))


def test_measuring_needs_a_gpu_and_a_gpu_build(monkeypatch):
    gpu_timing.require_gpu("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees none"):
        gpu_timing.require_gpu("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("alphaext.build_info", lambda: {"cuda": None})
    with pytest.raises(SystemExit, match="has CPU kernels only|CPU kernels only"):
        gpu_timing.require_gpu("cuda")


def test_probe_without_a_toolkit(tmp_path, monkeypatch):
    class Nothing:
        @staticmethod
        def find_toolkit(environment):
            class Search:
                toolkit, rejected = None, ["PATH: nothing there"]

            return Search()

    monkeypatch.setattr(gpu_probe, "load_build_support", lambda name: Nothing)
    assert gpu_probe.compile_probe(tmp_path, "9.0") == "no CUDA toolkit was found: PATH: nothing there"


# ---- The page --------------------------------------------------------------------------------------------------------


def row(provider: str, ms: float | None, **more) -> dict:
    times = None if ms is None else {"median_ms": ms, "iqr_ms": 0.01, "rounds": 9}
    base = {"size": "tiny", "dtype": "float32", "mode": "forward", "provider": provider, "floor_ms": 0.2}
    return {**base, "graph": times, "eager": {"median_ms": 50.0, "iqr_ms": 0.0, "rounds": 9}, **more}


def test_ratios():
    rows = [
        row("paper loop", 10.0),
        row("batched baddbmm", 2.0),
        row("batched + torch.compile", 1.5),
        row("alphaext dense", 0.25),
        row("alphaext factored", 0.01),
    ]
    compared = {entry["provider"]: entry for entry in gpu_report.compared(rows, 5.0)}
    dense, factored = compared["alphaext dense"], compared["alphaext factored"]
    assert dense["over_floor"] == pytest.approx(1.25) and dense["over_launch"] is None
    assert dense["faster_than_paper"] == pytest.approx(40) and dense["faster_than_rival"] == pytest.approx(6)
    assert factored["over_launch"] == pytest.approx(2)
    assert compared["paper loop"]["faster_than_rival"] is None
    alone = gpu_report.compared([row("alphaext dense", None)], None)[0]
    assert [alone[name] for name in ("over_floor", "over_launch", "faster_than_paper", "faster_than_rival")] == [None] * 4


def test_page():
    entry = {"status": "passed", "seconds": 12.3, "message": "fine", "notes": ["a note"], "commit": "abc", "when": "today"}
    limits = {"copy_gb_per_s": 4300.0, "barrier_launch_graph_us": 5.0, "probe": "left out: no nvcc"}
    rows = [row("paper loop", 10.0), row("alphaext dense", 0.25), row("batched + torch.compile", None, error="planted | it")]
    bench = {"copy_gb_per_s": 4300.0, "score_errors": {"tiny, float32": 1e-7}, "rows": rows}
    report = {
        "machine": MACHINE,
        "stages": [
            {**entry, "name": "build", "result": {"architecture": "9.0"}, "tail": ""},
            {**entry, "name": "tests", "status": "failed", "message": "1 failed", "result": {}, "tail": "the end"},
            {**entry, "name": "limits", "result": limits, "tail": ""},
            {**entry, "name": "bench", "result": bench, "tail": ""},
        ],
    }
    page = gpu_report.as_markdown(report)
    assert page.startswith("# Test GPU: build, tests, sanitizers, limits, benchmarks\n\n- gpu: Test GPU\n")
    assert "| tests | failed | 12 | abc | today | 1 failed |" in page
    assert "```\nthe end\n```" in page and page.count("- a note") == 4
    assert "| alphaext dense | 0.2500 | 0.0100 | 50.0000 | 0.2000 | 1.25 |  | 40.00 |  |" in page
    assert "- batched + torch.compile failed: planted | it" in page
    assert "| the probe of launches | left out: no nvcc |" in page
    assert json.loads(json.dumps(report)) == report
    lines = page.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|--"):
            assert line.count("|") == lines[number - 1].count("|") == lines[number + 1].count("|")
