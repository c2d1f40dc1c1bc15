"""One command that proves the package on a GPU: ``python bench/gpu.py``.

It builds the extension for the GPU that is there, runs the tests, watches the kernels with compute-sanitizer, measures the
card's limits and then the benchmarks. Each stage is a process of its own with a share of the time; one that fails is reported,
and the rest still runs. After each, ``bench/results/NAME.json`` and ``NAME.md`` are written. Exit codes: 0 all passed, 1 a
stage failed, 2 there is no GPU. Needs no network; this file itself needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_report import merged, read_report, write_report

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
WORK = ROOT / "build" / "gpu"
# Of the whole run: below the eight minutes that it is to take at most.
LIMIT_SECONDS = 470.0
TAIL_LINES = 40
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


# ---- Processes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    returncode: int
    output: str
    timed_out: bool

    @property
    def tail(self) -> str:
        """The end of what it printed."""
        return "\n".join(self.output.splitlines()[-TAIL_LINES:])

    def fault(self, what: str) -> str | None:
        """What went wrong, in words, or None."""
        if self.timed_out:
            return f"{what} ran out of time"
        return None if self.returncode == 0 else f"{what} ended with code {self.returncode}"


def run_process(
    command: Sequence[str | Path], limit: float, environment: Mapping[str, str] | None = None, log: Path | None = None
) -> Finished:
    """Run a command for at most ``limit`` seconds, then end it and every process it started; its output goes to ``log``."""
    if limit <= 0:
        return Finished(-1, "no time was left to start it", True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=None if environment is None else dict(environment),
                start_new_session=True,  # a group of its own, so that compilers and workers end with it
            )
        except OSError as error:
            return Finished(127, f"{command[0]}: {error}", False)
        timed_out = False
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        file.seek(0)
        output = file.read()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output, encoding="utf-8")
    return Finished(process.returncode, output, timed_out)


# ---- Stages --------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a stage found."""

    failed: str | None  # why, or None
    message: str = ""
    notes: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    tail: str = ""


@dataclass
class Context:
    """What stages are told."""

    machine: dict[str, Any]
    deadline: float  # of the stage that runs, on time.monotonic()'s clock
    work: Path = WORK
    all_tests: bool = False

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def environment(self, **more: str) -> dict[str, str]:
        """For the stages' processes: the package is imported from this checkout, wherever else it may be installed."""
        path = [str(ROOT), str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **more}


def missing_modules(names: Sequence[str]) -> list[str]:
    """Those that this interpreter cannot find."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def read_result(path: Path) -> dict[str, Any]:
    """What a stage's process wrote, all of it or what it got to."""
    return read_report(path) or {}


def run_build(context: Context) -> Outcome:
    """The extension, for this GPU alone."""
    capability = context.machine["capability"]
    objects = context.work / "objects"
    fresh = not objects.exists()
    environment = context.environment(ALPHAEXT_CUDA="1", TORCH_CUDA_ARCH_LIST=capability)
    command = [sys.executable, "setup.py", "build_ext", "--inplace", f"--build-temp={objects}"]
    started = time.monotonic()
    built = run_process(command, context.left(), environment, context.work / "build.log")
    result: dict[str, Any] = {"architecture": capability, "from_scratch": fresh}
    result["build_seconds"] = round(time.monotonic() - started, 1)
    fault = built.fault("setup.py build_ext")
    if fault:
        return Outcome(fault, result=result, tail=built.tail)
    code = "import alphaext, json; print(json.dumps(alphaext.build_info()))"
    asked = run_process([sys.executable, "-c", code], min(60, context.left()), context.environment())
    fault = asked.fault("importing what was built")
    if fault:
        return Outcome(fault, result=result, tail=asked.tail)
    info = json.loads(asked.output.splitlines()[-1])
    if info["cuda"] is None:
        return Outcome("the library that was built has no CUDA kernels", result=result, tail=built.tail)
    result |= {"cuda": info["cuda"], "kernels_for": " ".join(info["cuda_archs"]), "compiler": info["compiler"]}
    return Outcome(None, f"for {capability}, {'from scratch' if fresh else 'what had changed'}", result=result)


def tests_that_import(name: str, tests: Path) -> list[Path]:
    """The test files that cannot be read without a module."""
    pattern = re.compile(rf"^(?:from|import) {re.escape(name)}\b", re.MULTILINE)
    return sorted(path for path in tests.rglob("test_*.py") if pattern.search(path.read_text(encoding="utf-8")))


def pytest_command(
    missing: Sequence[str], processors: int, xml: Path, tests: Path, *, all_tests: bool = False
) -> tuple[list[str], list[str]]:
    """The command for the tests that this environment can run, and what is left out.

    Unless ``all_tests``, only those that need a GPU: the others take minutes, and prove here what they prove elsewhere.
    """
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "--durations=8", "-p", "no:cacheprovider"]
    command += [] if all_tests else ["-m", "gpu"]
    command += [f"--junitxml={xml}"]
    notes = []
    if "pytest_benchmark" in missing:
        command += ["-o", "addopts=-ra --strict-markers --strict-config --import-mode=importlib"]
    if "xdist" not in missing and processors >= 4:
        command += ["-n", str(min(8, processors // 2))]
    for name in ("hypothesis", "matplotlib"):
        for path in tests_that_import(name, tests) if name in missing else []:
            command += [f"--ignore={path}"]
            notes.append(f"tests/{path.name} did not run: {name} is not installed")
    if "expecttest" in missing:  # torch.library.opcheck imports it
        command += ["-k", "not opcheck"]
        notes.append("the tests with opcheck did not run: expecttest is not installed")
    return command, notes


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a test run, the names of failures and the reasons of skips."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {}
    failures, skips, on_gpu = [], Counter[str](), 0
    for case in cases:
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(name)
        elif skipped is not None:
            skips[skipped.get("message", "")] += 1
        elif case.get("classname", "").endswith("test_cuda") or re.search(r"\[(?:.*-)?cuda[-\]]", case.get("name", "")):
            on_gpu += 1
    passed = len(cases) - len(failures) - sum(skips.values())
    return {"passed": passed, "passed_on_gpu": on_gpu, "failures": failures, "skips": dict(skips)}


def run_tests(context: Context) -> Outcome:
    """The test suite, whose GPU tests fail rather than be skipped."""
    missing = missing_modules(["pytest", "pytest_benchmark", "xdist", "hypothesis", "matplotlib", "expecttest"])
    if "pytest" in missing:
        return Outcome("pytest is not installed")
    xml = context.work / "tests.xml"
    xml.unlink(missing_ok=True)
    context.work.mkdir(parents=True, exist_ok=True)
    command, notes = pytest_command(missing, os.cpu_count() or 1, xml, ROOT / "tests", all_tests=context.all_tests)
    environment = context.environment(ALPHAEXT_REQUIRE_GPU="1")
    ran = run_process(command, context.left(), environment, context.work / "tests.log")
    counts = read_junit(xml)
    failures, skips = counts.pop("failures", []), counts.pop("skips", {})
    notes += [f"failed: {name}" for name in failures[:20]]
    notes += [f"skipped {number}: {reason}" for reason, number in skips.items()]
    fault = ran.fault("pytest")
    if fault is None and not counts.get("passed_on_gpu"):
        fault = "no test ran on the GPU"
    message = f"{counts['passed']} passed, {counts['passed_on_gpu']} of them on the GPU" if counts else ""
    if failures:
        fault = f"{len(failures)} failed; {message}"
    return Outcome(fault, message, notes, counts, ran.tail)


# ---- Sanitizers ----------------------------------------------------------------------------------------------------------


def find_sanitizer(environment: Mapping[str, str], root: Path = Path("/")) -> tuple[Path | None, list[str]]:
    """compute-sanitizer, and the places that were looked at."""
    name = "compute-sanitizer"
    looked = ["PATH"]
    on_path = shutil.which(name, path=environment.get("PATH", ""))
    if on_path:
        return Path(on_path), looked
    homes = [Path(environment[key]) for key in ("CUDA_HOME", "CUDA_PATH") if environment.get(key)]
    homes += [root / "usr/local/cuda", *sorted((root / "usr/local").glob("cuda-*"), reverse=True)]
    for home in homes:
        looked.append(str(home))
        for path in (home / "bin" / name, home / "compute-sanitizer" / name, home / "extras" / name / name):
            if os.access(path, os.X_OK) and path.is_file():
                return path, looked
    return None, looked


def sanitizer_command(sanitizer: Path, tool: str, program: Sequence[str | Path]) -> list[str]:
    """One tool over one program."""
    command = [str(sanitizer), "--tool", tool, "--target-processes", "application-only", "--launch-timeout", "120"]
    command += ["--show-backtrace", "device"]
    if tool == "initcheck":
        # It must see every kernel's writes: memory that PyTorch wrote would else seem never written.
        command += ["--print-limit", "1000"]
    else:
        command += ["--print-limit", "20", "--kernel-name", "kernel_substring=alphaext"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # PyTorch asks questions whose answer is an error
    return [*command, *map(str, program)]


def read_findings(output: str) -> tuple[int | None, list[str], list[str]]:
    """The count of the tool's summary (None without one), the findings in this package's kernels, and all others."""
    counts = [int(number) for number in re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)", output, re.MULTILINE)]
    blocks: list[list[str]] = []
    for line in output.splitlines():
        match = re.match(r"^=======+( +)(\S.*)$", line)
        if match is None:
            continue
        indent, text = len(match.group(1)), match.group(2)
        if indent == 1:
            blocks.append([text])
        elif blocks:
            blocks[-1].append(text)
    ours: list[str] = []
    others: list[str] = []
    for first, *rest in blocks:
        if not re.search(r"Invalid|Misaligned|Uninitialized|Race reported|hazard detected|Barrier error|misuse", first):
            continue
        # Host frames name files, and a checkout's path may hold the package's name: only what is before them counts.
        device = []
        for text in rest:
            if text.startswith(("Host Frame", "Saved host")):
                break
            device.append(text)
        finding = "; ".join([first, *device[:2]])
        (ours if any("alphaext" in text for text in [first, *device]) else others).append(finding)
    return (sum(counts) if counts else None), ours, others


def judge_sanitizer(tool: str, ran: Finished) -> tuple[str | None, list[str]]:
    """What one tool's run shows: a fault or None, and notes."""
    count, ours, others = read_findings(ran.output)
    if ran.timed_out:
        return f"{tool} ran out of time", []
    if ours:
        return f"{tool}: {len(ours)} findings, the first: {ours[0]}", [f"{tool}: {text}" for text in ours[:5]]
    if ran.returncode != 0:
        return f"{tool}: the program under it ended with code {ran.returncode}", []
    if count is None:
        return f"{tool} printed no summary", []
    if count and tool != "initcheck":
        return f"{tool} counts {count} findings", []
    if count and not others:
        return f"{tool} counts {count} findings that could not be read", []
    return None, [f"{tool}: {len(others)} findings in kernels of others, the first: {others[0]}"] if others else []


def run_sanitizers(context: Context) -> Outcome:
    """Every operator at small sizes under each tool, all at once; and a planted fault that each must find."""
    sanitizer, looked = find_sanitizer(os.environ)
    if sanitizer is None:
        return Outcome(f"compute-sanitizer was not found (looked at {', '.join(looked)})")
    # Each tensor in an allocation of its own: PyTorch's cache would hide what is out of bounds or never written.
    environment = context.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    from gpu_probe import compile_probe

    probe = compile_probe(context.work / "probe", context.machine["capability"], max(1, min(60, context.left())))

    def one(tool: str) -> tuple[str | None, list[str], str, float]:
        started = time.monotonic()
        command = sanitizer_command(sanitizer, tool, [sys.executable, BENCH / "gpu_small.py"])
        ran = run_process(command, context.left(), environment, context.work / f"{tool}.log")
        fault, notes = judge_sanitizer(tool, ran)
        if fault is None and isinstance(probe, Path):
            log = context.work / f"{tool}-planted.log"
            command = sanitizer_command(sanitizer, tool, [probe, tool])
            planted = run_process(command, context.left(), environment, log)
            if not read_findings(planted.output)[1]:
                fault = f"{tool} did not find the fault that was planted for it"
                ran = planted
        return fault, notes, ran.tail if fault else "", time.monotonic() - started

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        outcomes = dict(zip(TOOLS, pool.map(one, TOOLS), strict=True))
    faults = [fault for fault, *_ in outcomes.values() if fault]
    notes = [note for _, notes, *_ in outcomes.values() for note in notes]
    if isinstance(probe, str):
        notes.append(f"the tools were not tried on planted faults: {probe}")
    result = {tool: f"{outcome[0] or 'clean'} ({outcome[3]:.0f} s)" for tool, outcome in outcomes.items()}
    tail = "\n".join(outcome[2] for outcome in outcomes.values() if outcome[2])
    return Outcome("; ".join(faults) or None, f"{len(TOOLS)} tools clean", notes, result, tail)


# ---- Measurements --------------------------------------------------------------------------------------------------------


def run_script(context: Context, name: str, *more: str | Path) -> Outcome:
    """A script of this directory that writes its result as it goes."""
    output = context.work / f"{name}.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, BENCH / f"{name}.py", "--device", "cuda", "--output", output, *more]
    ran = run_process(command, context.left(), context.environment(), context.work / f"{name}.log")
    fault = ran.fault(f"{name}.py")
    if fault and not ran.timed_out and ran.output.strip():
        fault += f": {ran.output.strip().splitlines()[-1]}"
    return Outcome(fault, result=read_result(output), tail=ran.tail)


def run_limits(context: Context) -> Outcome:
    """What the card can do."""
    outcome = run_script(context, "gpu_limits", "--directory", context.work / "probe")
    if outcome.result:
        copy, rate = outcome.result.get("copy_gb_per_s"), outcome.result.get("bfloat16_tflop_per_s")
        outcome.message = f"copy {copy} GB/s, bfloat16 {rate} TFLOP/s"
    return outcome


def run_bench(context: Context) -> Outcome:
    """The head and its peers."""
    outcome = run_script(context, "gpu_heads")
    rows = outcome.result.get("rows", [])
    failing = sorted({row["provider"] for row in rows if "error" in row})
    outcome.notes += [f"{name} failed somewhere; see its tables" for name in failing]
    outcome.message = f"{len(rows)} rows"
    return outcome


def run_large(context: Context) -> Outcome:
    """The crossing point, and very large heads."""
    outcome = run_script(context, "gpu_large")
    outcome.message = f"{len(outcome.result.get('crossing', [])) + len(outcome.result.get('large', []))} rows"
    return outcome


def run_training(context: Context) -> Outcome:
    """Whole trainings."""
    outcome = run_script(context, "gpu_training")
    trainings = outcome.result.get("trainings", {})
    outcome.message = ", ".join(f"{name} {entry['training_s']:.3f} s" for name, entry in trainings.items())
    return outcome


@dataclass(frozen=True)
class Stage:
    """A stage and its share of the time; what an earlier one leaves over goes to the next."""

    name: str
    seconds: float
    function: Callable[[Context], Outcome]
    text: str


def all_stages() -> list[Stage]:
    """The stages, in order."""
    return [
        Stage("build", 100, run_build, "the extension for this GPU"),
        Stage("tests", 105, run_tests, "the test suite; a GPU test that cannot run fails"),
        Stage("sanitizers", 80, run_sanitizers, "every operator under memcheck, racecheck, initcheck and synccheck"),
        Stage("limits", 20, run_limits, "bandwidths, matrix rates and launches of this card"),
        Stage("bench", 100, run_bench, "the head against its peers"),
        Stage("large", 30, run_large, "where cuBLAS's products are faster, and very large heads"),
        Stage("training", 35, run_training, "whole trainings"),
    ]


def select(stages: Sequence[Stage], wanted: Sequence[str] | None) -> list[Stage]:
    """The stages of these names, in their own order; all where none are named."""
    names = [stage.name for stage in stages]
    unknown = [name for name in wanted or [] if name not in names]
    if unknown:
        raise ValueError(f"there is no stage {unknown[0]!r}; there are {', '.join(names)}")
    return [stage for stage in stages if not wanted or stage.name in wanted]


def deadlines(stages: Sequence[Stage], start: float, limit: float) -> list[float]:
    """When each stage must have ended for all to fit into the limit."""
    total = sum(stage.seconds for stage in stages)
    ends, spent = [], 0.0
    for stage in stages:
        spent += stage.seconds
        ends.append(start + limit * spent / total)
    return ends


def run_stage(stage: Stage, context: Context) -> dict[str, Any]:
    """One stage, as an entry of the report; whatever it raises fails it alone."""
    started = time.monotonic()
    try:
        outcome = stage.function(context)
    except Exception as error:
        outcome = Outcome(f"{type(error).__name__}: {error}", tail=traceback.format_exc())
    return {
        "name": stage.name,
        "status": "failed" if outcome.failed else "passed",
        "seconds": round(time.monotonic() - started, 1),
        "message": outcome.failed or outcome.message,
        "notes": outcome.notes,
        "commit": context.machine.get("commit", "unknown"),
        "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "result": outcome.result,
        "tail": outcome.tail if outcome.failed else "",
    }


def run_stages(
    stages: Sequence[Stage], context: Context, limit: float, on_done: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Every stage in turn; ``on_done`` gets all entries so far after each."""
    entries: list[dict[str, Any]] = []
    for stage, deadline in zip(stages, deadlines(stages, time.monotonic(), limit), strict=True):
        context.deadline = deadline
        print(f"{stage.name}: {stage.text} (at most {context.left():.0f} s)", flush=True)
        entry = run_stage(stage, context)
        entries.append(entry)
        if entry["status"] == "failed" and entry["tail"]:
            print("\n".join(f"    {line}" for line in entry["tail"].splitlines()))
        print(f"{stage.name} {entry['status']} in {entry['seconds']:.0f} s: {entry['message']}\n", flush=True)
        on_done(entries)
    return entries


# ---- The command ---------------------------------------------------------------------------------------------------------


def describe_machine(context: Context) -> tuple[dict[str, Any], str]:
    """What bench/machine.py says, in a process of its own; empty with the reason where it cannot say."""
    ran = run_process([sys.executable, BENCH / "machine.py"], 120, context.environment())
    lines = [line for line in ran.output.splitlines() if line.startswith("{")]
    if ran.returncode != 0 or not lines:
        return {}, ran.tail
    machine: dict[str, Any] = json.loads(lines[-1])
    return machine, ""


def default_name(machine: Mapping[str, Any]) -> str:
    """A file name out of the GPU's."""
    return "gpu-" + "-".join(re.findall(r"[a-z0-9]+", str(machine["gpu"]).lower()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description="Build, test, check and measure alphaext on the GPU of this machine."
    )
    parser.add_argument("--stage", action="append", metavar="NAME", help="run this stage alone; may be repeated")
    parser.add_argument("--list", action="store_true", help="list the stages and end")
    parser.add_argument("--output", metavar="NAME", help="name of the files written (default: after the GPU)")
    parser.add_argument("--directory", type=Path, default=BENCH / "results", help="where (default: bench/results)")
    parser.add_argument("--all-tests", action="store_true", help="run those tests too that need no GPU (some minutes)")
    parser.add_argument("--commit", help="what to record as the commit, where there is no git history")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="for all stages together (default: %(default)g)"
    )
    options = parser.parse_args(arguments)
    if options.output and re.fullmatch(r"[\w.-]+", options.output) is None:
        parser.error(f"--output must be a name of letters, digits, '.', '_' and '-', got {options.output!r}")
    if not options.limit > 0:
        parser.error(f"--limit must be positive, got {options.limit}")
    try:
        options.stages = select(all_stages(), options.stage)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(arguments)
    if options.list:
        for stage in options.stages:
            print(f"{stage.name:<12}{stage.text}")
        return 0
    started = time.monotonic()
    context = Context({}, started + options.limit, all_tests=options.all_tests)
    context.machine, trouble = describe_machine(context)
    if "gpu" not in context.machine:
        reason = f"PyTorch cannot be asked:\n{trouble}" if trouble else f"torch {context.machine['torch']} sees none"
        print(f"bench/gpu.py needs a GPU, and on this machine there is none to use: {reason}", file=sys.stderr)
        return 2
    if options.commit:
        context.machine["commit"] = options.commit
    name = options.output or default_name(context.machine)
    old = read_report(options.directory / f"{name}.json")
    print(", ".join(f"{key} {context.machine[key]}" for key in ("gpu", "driver", "cuda", "torch", "commit")) + "\n", flush=True)

    def done(entries: list[dict[str, Any]]) -> None:
        if entries[-1]["name"] == "build":
            commit = context.machine["commit"]
            context.machine = (describe_machine(context)[0] or context.machine) | {"commit": commit}
        write_report(options.directory, name, merged(old, context.machine, entries))

    entries = run_stages(options.stages, context, max(1.0, options.limit - (time.monotonic() - started)), done)
    for entry in entries:
        print(f"{entry['name']:<12}{entry['status']:<8}{entry['seconds']:6.0f} s  {entry['message']}")
    print(f"in all {time.monotonic() - started:.0f} s; {options.directory / name}.md and .json, logs in {WORK}")
    return 1 if any(entry["status"] == "failed" for entry in entries) else 0


if __name__ == "__main__":
    sys.exit(main())
