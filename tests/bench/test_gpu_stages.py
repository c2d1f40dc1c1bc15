"""bench/gpu.py as a run: its stages and their time, and what is left of it when something hangs, crashes or is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not (BENCH / "gpu.py").is_file():
    pytest.skip("the tests of the benchmarks need the source tree", allow_module_level=True)

import gpu  # noqa: E402
from gpu_proof import building, preflight, processes, report, stages  # noqa: E402
from gpu_proof.parts import faults_of, read_parts, results_of  # noqa: E402
from gpu_proof.stages import Context, Outcome, Stage  # noqa: E402

MACHINE = {"gpu": "Test GPU", "capability": "9.0", "driver": "1", "cuda": "13.0", "torch": "2.11", "commit": "abc"}


@pytest.fixture
def context(tmp_path):
    return Context(dict(MACHINE), time.monotonic() + 60, tmp_path / "work")


def stage(name: str, function=lambda context: Outcome(None, "fine"), seconds: float = 1, **more) -> Stage:
    return Stage(name, seconds, function, "a stage", **more)


def run_python(program: str, limit: float, log: Path) -> processes.Finished:
    return processes.run_process([sys.executable, "-c", program], limit, None, log)


# ---- Time ------------------------------------------------------------------------------------------------------------


def test_stages_are_the_documented_ones_in_order():
    names = [entry.name for entry in gpu.all_stages()]
    assert names[:5] == ["preflight", "build", "smoke", "core", "tests"]
    assert names[5:] == ["sanitizers", "profile", "large", "training", "peers", "compiled"]
    assert stages.LIMIT_SECONDS < 8 * 60


def test_selection_keeps_the_order():
    every = gpu.all_stages()
    assert [entry.name for entry in stages.select(every, ["peers", "build", "peers"])] == ["build", "peers"]
    assert [entry.name for entry in stages.select(every, None)] == [entry.name for entry in every]
    with pytest.raises(ValueError, match="there is no stage 'fly'; there are preflight, build, smoke"):
        stages.select(every, ["fly"])


def test_what_a_stage_leaves_over_goes_to_the_next():
    assert stages.deadlines([stage("a", seconds=10), stage("b", seconds=30)], 100.0, 80.0) == [120.0, 180.0]
    assert stages.deadlines([stage("a", seconds=10)], 0.0, 400.0) == [400.0]
    # More than fits into a run: nobody's share shrinks, and the last get what the others leave over.
    assert stages.deadlines([stage("a", seconds=400), stage("b", seconds=400)], 0.0, 470.0) == [400.0, 470.0]
    assert stages.deadlines([stage("a", seconds=400), stage("b", seconds=400)], 0.0, 235.0) == [200.0, 235.0]


# ---- Faults ----------------------------------------------------------------------------------------------------------


def test_a_failing_stage_is_reported_and_the_rest_runs(context, capsys):
    def explode(context: Context) -> Outcome:
        raise RuntimeError("planted")

    seen: list[int] = []
    these = [stage("a"), stage("b", explode), stage("c", lambda _: Outcome("broke", tail="its end")), stage("d")]
    entries = stages.run_stages(these, context, 60, lambda so_far: seen.append(len(so_far)))
    assert [entry["status"] for entry in entries] == ["passed", "failed", "failed", "passed"]
    assert entries[1]["message"] == "RuntimeError: planted" and "Traceback" in entries[1]["tail"]
    assert seen == [1, 1, 2, 2, 3, 3, 4, 4]  # when each begins and when it has ended
    printed = capsys.readouterr().out
    assert "b failed in 0 s: RuntimeError: planted" in printed and "    its end" in printed


def test_without_a_build_only_what_needs_none_runs(context):
    these = [stage("build", lambda _: Outcome("no nvcc"), needs_build=False), stage("a"), stage("b", needs_build=False)]
    entries = stages.run_stages(these, context, 60, lambda so_far: None)
    assert [entry["status"] for entry in entries] == ["failed", "skipped", "passed"]
    assert entries[1]["message"] == "there is no build to run"


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path):
    pid_file = tmp_path / "pid"
    program = f"""import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pid_file)!r}, "w").write(str(child.pid))
print("begun", flush=True)
time.sleep(60)"""
    started = time.monotonic()
    finished = run_python(program, 2, tmp_path / "log")
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


def test_a_process_that_cannot_be_killed_is_left_behind(tmp_path, monkeypatch):
    kill = os.killpg
    started: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: started.append(group))  # as the driver may: nothing happens
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.2)
    finished = run_python("print('begun', flush=True); import time; time.sleep(60)", 1, tmp_path / "log")
    kill(started[0], signal.SIGKILL)
    assert finished.left_behind and finished.fault("it") == "it ran out of time and could not be killed"
    assert finished.output == "begun\n"


def test_processes_that_fail_or_do_not_start(tmp_path):
    assert run_python("raise SystemExit(3)", 60, tmp_path / "log").fault("it") == "it ended with code 3"
    assert processes.run_process([tmp_path / "gone"], 60, None, tmp_path / "log").returncode == 127
    assert processes.run_process(["true"], 0, None, tmp_path / "log").timed_out
    assert run_python("print(1)", 60, tmp_path / "log").fault("it") is None
    assert (tmp_path / "log").read_text().endswith("1\n")  # each run adds to it


PROGRAM = """import ctypes, os, sys, time
from pathlib import Path
from gpu_proof.parts import Part, finish, run_parts

class AcceleratorError(Exception): pass
sys.modules["torch"] = type("torch", (), {"AcceleratorError": AcceleratorError})

def hang():  # in a call that never returns, and holds the interpreter's lock, as a driver may
    ctypes.PyDLL(None).pause()

def fault():
    raise AcceleratorError("illegal memory access")

works = {"first": lambda: 1, "hangs": hang, "second": lambda: 2, "wrong": lambda: 1 / 0, "crashes": os.abort,
         "faults": fault, "last": lambda: 3, "slow": lambda: time.sleep(1e-3)}
finish(run_parts([Part(name, work, 1.0) for name, work in works.items()], Path(sys.argv[1])))
"""


def test_a_program_goes_on_behind_what_hangs_and_what_crashes(context, monkeypatch):
    monkeypatch.setattr(stages, "program_command", lambda name, device, output, *more: [sys.executable, "-c", PROGRAM, output])
    outcome = stages.outcome_of_program(context, "smoke")
    entries = outcome.result["parts"]
    assert list(entries) == ["first", "hangs", "second", "wrong", "crashes", "faults", "last", "slow"]
    assert results_of(entries) == {"first": 1, "second": 2, "last": 3, "slow": None}
    assert faults_of(entries) == {
        "hangs": "it did not end within 1 s",
        "wrong": "ZeroDivisionError: division by zero",
        "crashes": "the process died in it",
        "faults": "AcceleratorError: illegal memory access",
    }
    assert outcome.failed == "4 wrong, the first: hangs; 4 of 8 parts done"
    log = (context.work / "smoke.log").read_text()
    assert log.count("CASE hangs") == 1 and "Timeout" in log and "in hang" in log  # where it hung


def test_a_program_that_time_cuts_short_tells_what_it_came_to(context, monkeypatch):
    monkeypatch.setattr(stages, "program_command", lambda name, device, output, *more: [sys.executable, "-c", SLOW, output])
    context.deadline = time.monotonic() + 2
    told: list[dict] = []
    context.report = told.append
    monkeypatch.setattr(stages, "REPORT_SECONDS", 0.0)
    outcome = stages.outcome_of_program(context, "smoke")
    assert outcome.failed is None and outcome.incomplete == "smoke ran out of time, in sleeps; 1 of 2 parts done"
    assert told[-1]["parts"]["first"]["result"] == 1 and told[-1]["parts"]["sleeps"]["status"] == "running"


SLOW = """import sys, time
from pathlib import Path
from gpu_proof.parts import Part, run_parts
run_parts([Part("first", lambda: 1), Part("sleeps", lambda: time.sleep(60), 0)], Path(sys.argv[1]))
"""


def test_a_program_that_never_begins_is_not_started_again_and_again(context, monkeypatch):
    broken = "print('no module of this name'); raise SystemExit(1)"
    monkeypatch.setattr(stages, "program_command", lambda *arguments: [sys.executable, "-c", broken])
    outcome = stages.outcome_of_program(context, "smoke")
    assert outcome.failed == "smoke ended with code 1: no module of this name"


# ---- Before the first kernel -------------------------------------------------------------------------------------------


def stand_ins(directory: Path, **programs: str) -> Path:
    """Programs that print a text for ``--version``."""
    directory.mkdir(exist_ok=True)
    for name, text in programs.items():
        path = directory / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\necho '{text}'\n")
        path.chmod(0o755)
    return directory


def test_preflight_names_what_is_missing_and_what_to_carry_along(context, tmp_path, monkeypatch):
    place = stand_ins(tmp_path / "bin", nvcc="release 13.0, V13.0.88", compute_sanitizer="Version 2025.3.1")
    monkeypatch.setattr(preflight, "find_program", lambda name, environment: (shutil_which(place, name), ["PATH", "/here"]))
    versions = {name: "99.0" for name in preflight.PACKAGES} | {"setuptools": "68.1.2", "torch": "2.11.0+cu130"}

    def version(name: str) -> str:
        if name == "expecttest":
            raise preflight.importlib.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(preflight.importlib.metadata, "version", version)
    outcome = preflight.run_preflight(context)
    assert outcome.result["nvcc"] == "13.0.88" and outcome.result["compute-sanitizer"] == "2025.3.1"
    assert outcome.result["ncu"] == outcome.result["g++"] == outcome.result["expecttest"] == "missing"
    assert outcome.failed == "g++, setuptools missing or too old"
    assert "ncu was not found (looked at PATH, /here): no kernel is profiled." in outcome.notes
    sentence = (
        "expecttest is not installed: the tests with opcheck are left out. "
        "Carry it along as a wheel: pip download --no-deps expecttest"
    )
    assert sentence in outcome.notes
    (old,) = [note for note in outcome.notes if note.startswith("setuptools is 68.1.2, and 77 is the oldest")]
    assert old.endswith('pip download --no-deps "setuptools>=77"')


def shutil_which(place: Path, name: str) -> Path | None:
    return place / name if (place / name).exists() else None


def test_a_program_that_does_not_answer_is_as_good_as_missing(tmp_path, monkeypatch):
    path = tmp_path / "ncu"
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    path.chmod(0o755)
    monkeypatch.setattr(preflight, "find_program", lambda name, environment: (path, []))
    started = time.monotonic()
    version, sentence = preflight.version_of("ncu", 0.3)
    assert time.monotonic() - started < 20 and version is None and "does not answer" in sentence


def test_the_driver_is_asked_without_torch(tmp_path, monkeypatch):
    place = stand_ins(tmp_path / "bin", nvidia_smi="NVIDIA H200, 9.0, 580.159.03, 143771")
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    assert preflight.ask_driver(20.0) == {
        "gpu": "NVIDIA H200", "capability": "9.0", "driver": "580.159.03", "gpu_memory_mib": "143771"
    }  # fmt: skip
    stand_ins(place, nvidia_smi="No devices were found")
    assert preflight.ask_driver(20.0) == {}


@pytest.fixture
def built(context, monkeypatch):
    """Builds that end as told; returns the commands with what matters of their environments."""
    commands: list[list[str]] = []
    endings = [processes.Finished(0, "")]

    def run(command, limit, environment, log, poll=None):
        told = ("MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "ALPHAEXT_CUDA", "NVCC_APPEND_FLAGS")
        commands.append([*map(str, command), *(f"{key}={environment[key]}" for key in told)])
        return endings[-1]

    monkeypatch.setattr(building, "run_process", run)
    monkeypatch.setattr(building, "compile_probe", lambda *arguments: "no nvcc")
    machine = {**MACHINE, "alphaext": "0.1.0", "kernels_for": "9.0", "multiprocessors": 132}
    monkeypatch.setattr(building, "ask_torch", lambda context: (dict(machine), ""))
    return commands, endings, machine


def test_build_is_for_this_gpu_alone_and_names_lines(context, built):
    commands, _, _ = built
    outcome = building.run_build(context)
    assert outcome.failed is None and outcome.result["architecture"] == "9.0"
    wanted = {"TORCH_CUDA_ARCH_LIST=9.0", "ALPHAEXT_CUDA=1", f"MAX_JOBS={os.cpu_count()}", "NVCC_APPEND_FLAGS=-lineinfo"}
    assert wanted <= set(commands[0]) and outcome.machine["multiprocessors"] == 132
    assert outcome.notes == ["the probe of launches could not be compiled: no nvcc"]


def test_a_second_run_takes_the_build_of_the_first(context, built):
    _, endings, _ = built
    endings.append(processes.Finished(0, "nothing to compile: an earlier build is in build/kept/a.so\n"))
    outcome = building.run_build(context)
    assert outcome.failed is None and outcome.message == "for 9.0, of an earlier run"


@pytest.mark.parametrize(
    ("ending", "kernels", "complaint"),
    [
        (processes.Finished(1, "no nvcc"), "9.0", "the build ended with code 1"),
        (processes.Finished(-9, "", True), "9.0", "the build ran out of time"),
        (processes.Finished(0, ""), "none: built without CUDA", "has no CUDA kernels"),
        (processes.Finished(0, ""), None, "what was built cannot be imported"),
    ],
)
def test_a_build_that_fails(context, built, monkeypatch, ending, kernels, complaint):
    _, endings, machine = built
    endings.append(ending)
    found = (
        {**machine, "alphaext": "not built: undefined symbol"} if kernels is None else {**machine, "kernels_for": kernels},
        "",
    )
    monkeypatch.setattr(building, "ask_torch", lambda context: found)
    assert complaint in str(building.run_build(context).failed)


# ---- The command and its files -----------------------------------------------------------------------------------------


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ALPHAEXT_EMULATED_GPU", None)
    command = [sys.executable, str(BENCH / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=300)


def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path):
    finished = run_command("--directory", str(tmp_path / "results"), "--work", str(tmp_path / "work"))
    assert finished.returncode == 2
    assert finished.stderr.startswith("bench/gpu.py needs a GPU, and on this machine there is none to use: torch ")
    assert finished.stdout == "" and not (tmp_path / "results").exists()


def test_list_needs_nothing():
    finished = run_command("--list", "--stage", "core")
    assert finished.returncode == 0
    assert finished.stdout == "core          45 s  the package alone beside the floor of this card\n"


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


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A run whose GPU is made up; returns the arguments that keep its files together."""

    def find(context: Context) -> None:
        context.machine |= MACHINE

    monkeypatch.setattr(gpu, "find_gpu", find)
    monkeypatch.delenv("ALPHAEXT_EMULATED_GPU", raising=False)
    return ["--directory", str(tmp_path / "out"), "--work", str(tmp_path / "work")]


def test_files_are_written_when_a_stage_begins_and_when_it_ends(here, tmp_path, monkeypatch):
    written: list[list[tuple[str, str]]] = []

    def look(context: Context) -> Outcome:
        (context.work / "it.log").parent.mkdir(exist_ok=True)
        (context.work / "it.log").write_text("printed")
        found = report.read_report(tmp_path / "out" / "gpu-test-gpu.json")
        written.append([(entry["name"], entry["status"]) for entry in found["stages"]])
        return Outcome("broke" if len(written) == 2 else None)

    monkeypatch.setattr(gpu, "all_stages", lambda: [stage("a", look), stage("b", look), stage("c", look)])
    assert gpu.main([*here, "--commit", "def"]) == 1
    passed, failed = ("a", "passed"), ("b", "failed")
    assert written == [[("a", "running")], [passed, ("b", "running")], [passed, failed, ("c", "running")]]
    page = (tmp_path / "out" / "gpu-test-gpu.md").read_text()
    assert "| b | failed |" in page and "- commit: def" in page
    assert gpu.main([*here, "--stage", "a"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["gpu-test-gpu-logs.tar.gz", "gpu-test-gpu.json", "gpu-test-gpu.md"]
    with tarfile.open(tmp_path / "out" / "gpu-test-gpu-logs.tar.gz") as archive:
        assert archive.extractfile("it.log").read() == b"printed"


def test_long_logs_keep_their_beginning_and_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LOG_BYTES", 10)
    (tmp_path / "a.log").write_text("beginning and end")
    report.write_logs(tmp_path, tmp_path / "logs.tar.gz")
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert archive.extractfile("a.log").read() == b"begin\n[...]\nd end"


def test_what_is_not_finished_is_no_success(here, monkeypatch):
    monkeypatch.setattr(gpu, "all_stages", lambda: [stage("a", lambda _: Outcome(incomplete="ran out of time"))])
    assert gpu.main(here) == 1


def test_a_stage_run_alone_keeps_the_others_of_the_same_gpu():
    old = {"machine": MACHINE, "stages": [{"name": "core", "seconds": 1}, {"name": "peers", "seconds": 2}]}
    new = [{"name": "peers", "seconds": 3}]
    assert report.merged(old, MACHINE, new)["stages"] == [old["stages"][0], *new]
    assert report.merged(old, {**MACHINE, "gpu": "another"}, new)["stages"] == new
    assert report.merged(None, MACHINE, new)["stages"] == new


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "report.json"
    report.write_whole(path, "old")

    def fail(*_):
        raise OSError("planted")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="planted"):
        report.write_whole(path, "new")
    assert path.read_text() == "old"
    path.write_text("{half")
    assert report.read_report(path) is None and report.read_report(tmp_path / "gone") is None


# A run of three stages, each a process that writes what it found and then sleeps.
KILLED = """import sys
sys.path[:0] = [{bench!r}]
import gpu
from gpu_proof import stages
stages.REPORT_SECONDS = 0.0
program = {program!r}
stages.program_command = lambda name, device, output, *more: [sys.executable, "-c", program, str(output)]
gpu.all_stages = lambda: [gpu.program_stage(name, 20, "a stage") for name in ("one", "two", "three")]
gpu.find_gpu = lambda context: context.machine.update(gpu="Test GPU", commit="abc")
sys.exit(gpu.main(sys.argv[1:]))
"""
FOUND = """import sys, time
from pathlib import Path
from gpu_proof.parts import Part, run_parts
run_parts([Part("first", lambda: 1), Part("sleeps", lambda: time.sleep(1.5), 0)], Path(sys.argv[1]))
"""


@pytest.mark.parametrize("seconds", [0.3, 1.2, 2.6])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked to end"])
def test_a_run_that_is_killed_leaves_a_report_of_all_that_was_known(tmp_path, seconds, number):
    script = KILLED.format(bench=str(BENCH), program=FOUND)
    command = [sys.executable, "-c", script, "--directory", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=without_emulation())
    path = tmp_path / "out" / "gpu-test-gpu.json"
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)
    process.send_signal(number)
    process.wait(timeout=30)
    found = json.loads(path.read_text())
    page = (tmp_path / "out" / "gpu-test-gpu.md").read_text()
    assert len(list((tmp_path / "out").glob("[!.]*"))) <= 8
    *ended, last = found["stages"]
    for entry in ended:
        assert entry["status"] == "passed" and results_of(entry["result"]["parts"]) == {"first": 1, "sleeps": None}
        assert f"| {entry['name']} | passed |" in page
    if last["status"] == "passed":
        return  # it was hit between two stages
    assert last["status"] == ("running" if number == signal.SIGKILL else "incomplete")
    assert f"| {last['name']} | {last['status']} |" in page
    if number == signal.SIGTERM:
        assert process.returncode == 1 and last["message"] == "it was ended from outside"
    known = read_parts(tmp_path / "work" / f"{last['name']}.json")
    if known.get("first", {}).get("status") == "done" and number == signal.SIGTERM:
        assert last["result"]["parts"]["first"]["result"] == 1


def without_emulation() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "ALPHAEXT_EMULATED_GPU"}
