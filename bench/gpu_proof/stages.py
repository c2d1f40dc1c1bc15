"""Stages: each has a share of the time and reports while it runs; one that fails leaves the others to run."""

from __future__ import annotations

import datetime
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_proof.parts import AGAIN, Entries, faults_of, read_parts, results_of
from gpu_proof.processes import ROOT, run_process

BENCH = ROOT / "bench"
WORK = ROOT / "build" / "gpu"
# Of the whole run: below the eight minutes that it is to take at most.
LIMIT_SECONDS = 470.0
# A program that hangs or crashes is started again, behind the part in which it ended, so many times.
STARTS = 5
# How often the report is written anew while a stage runs.
REPORT_SECONDS = 2.0


@dataclass
class Outcome:
    """What a stage found."""

    failed: str | None = None  # why, or None
    message: str = ""
    notes: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    tail: str = ""
    # What was not reached when time ran out, or is missing on this machine; nothing that was reached is wrong.
    incomplete: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)  # what it learnt of the machine

    @property
    def status(self) -> str:
        """In a word."""
        return "failed" if self.failed else "incomplete" if self.incomplete else "passed"


@dataclass
class Context:
    """What stages are told."""

    machine: dict[str, Any]
    deadline: float  # of the stage that runs, on time.monotonic()'s clock
    work: Path = WORK
    device: str = "cuda"
    emulated: Path | None = None  # a build of tests/emulated_gpu.py that stands for a GPU
    all_tests: bool = False
    report: Callable[[dict[str, Any]], object] = lambda result: None  # told what the running stage has found so far
    reported: float = 0.0

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def environment(self, **more: str) -> dict[str, str]:
        """For the stages' processes: the package is imported from this checkout, wherever else it may be installed."""
        path = [str(ROOT), str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])]
        emulated = {} if self.emulated is None else {"ALPHAEXT_EMULATED_GPU": str(self.emulated)}
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **emulated, **more}

    def progress(self, found: Callable[[], dict[str, Any]]) -> Callable[[], None]:
        """What a running process calls: now and then what it has found goes into the report."""

        def tell() -> None:
            if time.monotonic() - self.reported >= REPORT_SECONDS:
                self.reported = time.monotonic()
                self.report(found())

        return tell


@dataclass(frozen=True)
class Stage:
    """A stage and its share of the time; what an earlier one leaves over goes to the next."""

    name: str
    seconds: float
    function: Callable[[Context], Outcome]
    text: str
    needs_build: bool = True


def program_command(name: str, device: str, output: Path, *more: str) -> list[str | Path]:
    """A program of gpu_proof/__main__.py."""
    return [sys.executable, "-m", "gpu_proof", name, "--device", device, "--output", output, *more]


def run_program(context: Context, name: str, *more: str) -> tuple[Entries, str | None, str]:
    """A program's parts, what went wrong besides, and the end of its output; where it hangs or dies it is started again."""
    output, log = context.work / f"{name}.json", context.work / f"{name}.log"
    for path in (output, log):
        path.unlink(missing_ok=True)
    more = (*more, "--small") if context.emulated else more
    command = program_command(name, context.device, output, *more)
    fault, tail = None, ""
    for _ in range(STARTS):
        known = len(read_parts(output))
        told = context.progress(lambda: {"parts": read_parts(output)})
        ran = run_process(command, context.left(), context.environment(), log, told)
        entries, tail = read_parts(output), ran.tail
        lost = any(entry["status"] == "running" for entry in entries.values())
        if ran.timed_out or ran.left_behind:
            fault = ran.fault(name)
        elif len(entries) > known and (lost or ran.returncode == AGAIN):
            continue
        elif ran.returncode != 0 and not faults_of(entries):
            lines = ran.output.strip().splitlines()
            fault = f"{ran.fault(name)}: {lines[-1] if lines else 'it printed nothing'}"
        break
    else:
        fault = f"{name} was given up after {STARTS} starts"
    return read_parts(output), fault, tail


def outcome_of_program(context: Context, name: str, *more: str) -> Outcome:
    """A stage that is one program: wrong parts fail it, parts that time did not reach leave it incomplete."""
    entries, fault, tail = run_program(context, name, *more)
    faults = faults_of(entries)
    outcome = Outcome(result={"parts": entries}, tail=tail)
    outcome.message = f"{len(results_of(entries))} of {len(entries)} parts done"
    outcome.notes = [f"wrong: {part}: {text}" for part, text in list(faults.items())[:20]]
    running = [part for part, entry in entries.items() if entry["status"] == "running"]
    if faults:
        outcome.failed = f"{len(faults)} wrong, the first: {next(iter(faults))}; {outcome.message}"
    elif fault and "ran out of time" in fault:
        at = f", in {running[0]}" if running else ""
        outcome.incomplete = f"{fault}{at}; {outcome.message}"
    else:
        outcome.failed = fault
    return outcome


def select(stages: Sequence[Stage], wanted: Sequence[str] | None) -> list[Stage]:
    """The stages of these names, in their own order; all where none are named."""
    names = [stage.name for stage in stages]
    unknown = [name for name in wanted or [] if name not in names]
    if unknown:
        raise ValueError(f"there is no stage {unknown[0]!r}; there are {', '.join(names)}")
    return [stage for stage in stages if not wanted or stage.name in wanted]


def deadlines(stages: Sequence[Stage], start: float, limit: float) -> list[float]:
    """When each stage must have ended: its seconds, and those that the ones before it left over.

    The seconds are for a run of ``LIMIT_SECONDS``; a longer or shorter one stretches them, and so does a run of few stages.
    """
    scale = limit / min(LIMIT_SECONDS, sum(stage.seconds for stage in stages))
    ends, spent = [], 0.0
    for stage in stages:
        spent += stage.seconds * scale
        ends.append(start + min(spent, limit))
    return ends


def entry_of(stage: Stage, context: Context, status: str, **more: Any) -> dict[str, Any]:
    """A stage's entry in the report."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    empty = {"seconds": 0.0, "message": "", "notes": [], "result": {}, "tail": ""}
    commit = context.machine.get("commit", "unknown")
    return {"name": stage.name, "status": status, "commit": commit, "when": now, **empty, **more}


def run_stage(stage: Stage, context: Context) -> dict[str, Any]:
    """One stage, as an entry of the report; whatever it raises fails it alone."""
    started = time.monotonic()
    try:
        outcome = stage.function(context)
    except Exception as error:
        outcome = Outcome(f"{type(error).__name__}: {error}", tail=traceback.format_exc())
    context.machine.update(outcome.machine)
    return entry_of(
        stage,
        context,
        outcome.status,
        seconds=round(time.monotonic() - started, 1),
        message=outcome.failed or outcome.incomplete or outcome.message,
        notes=outcome.notes,
        result=outcome.result,
        tail=outcome.tail if outcome.status != "passed" else "",
    )


def run_stages(
    stages: Sequence[Stage], context: Context, limit: float, on_change: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Every stage in turn; ``on_change`` gets all entries so far after each, and while one runs."""
    entries: list[dict[str, Any]] = []
    unbuilt = False
    for stage, deadline in zip(stages, deadlines(stages, time.monotonic(), limit), strict=True):
        context.deadline, started = deadline, time.monotonic()

        def running(result: Mapping[str, Any], stage: Stage = stage, started: float = started) -> None:
            seconds = round(time.monotonic() - started, 1)
            on_change([*entries, entry_of(stage, context, "running", seconds=seconds, result=dict(result))])

        context.report = running
        print(f"{stage.name}: {stage.text} (at most {context.left():.0f} s)", flush=True)
        running({})
        if unbuilt and stage.needs_build:
            entry = entry_of(stage, context, "skipped", message="there is no build to run")
        elif context.left() <= 0:
            entry = entry_of(stage, context, "skipped", message="no time was left for it")
        else:
            entry = run_stage(stage, context)
        unbuilt = unbuilt or (stage.name == "build" and entry["status"] != "passed")
        entries.append(entry)
        if entry["status"] == "failed" and entry["tail"]:
            print("\n".join(f"    {line}" for line in entry["tail"].splitlines()))
        print(f"{stage.name} {entry['status']} in {entry['seconds']:.0f} s: {entry['message']}\n", flush=True)
        on_change(entries)
    return entries


def run_core(context: Context) -> Outcome:
    """The table that matters."""
    outcome = outcome_of_program(context, "core")
    found = results_of(outcome.result["parts"])
    epoch = found.get("training: an epoch")
    step = "" if epoch is None else f", a step of training {epoch['step_us']:.2f} us"
    outcome.message += f"; copy {found.get('copy_gb_per_s')} GB/s{step}"
    return failing_rows(outcome)


def failing_rows(outcome: Outcome) -> Outcome:
    """Fails a stage in whose tables a row of the package itself has an error; of peers it is noted."""
    rows = [row for found in results_of(outcome.result["parts"]).values() if isinstance(found, list) for row in found]
    wrong = [row for row in rows if "error" in row]
    for row in wrong:
        outcome.notes.append(f"{row['provider']}, {row['size']}, {row['dtype']}, {row['mode']} failed: {row['error']}")
    own = [row for row in wrong if row["provider"].startswith("alphaext")]
    if own and not outcome.failed:
        outcome.failed = f"{len(own)} rows of the package failed, the first: {outcome.notes[0]}"
    return outcome


def program_stage(name: str, seconds: float, text: str) -> Stage:
    """A stage that is one program."""
    return Stage(name, seconds, lambda context: failing_rows(outcome_of_program(context, name)), text)
