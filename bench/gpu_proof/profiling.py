"""Nsight Compute over one launch of each main kernel, as text: what each waits for, line by line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gpu_proof.preflight import find_program
from gpu_proof.processes import run_process
from gpu_proof.report import write_whole
from gpu_proof.stages import Context, Outcome, program_command

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats", "SourceCounters")
# Figure -> its name in the text.
FIGURES = {
    "us": "Duration",
    "memory %": "Memory Throughput",
    "compute %": "Compute (SM) Throughput",
    "registers": "Registers Per Thread",
    "occupancy %": "Achieved Occupancy",
}
TO_MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6, "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6}


def profile_command(profiler: Path, program: list[str | Path]) -> list[str]:
    """The profiler over the program that marks its launches. The clocks stay as they are: the card is shared."""
    command = [str(profiler), "--clock-control", "none", "--profile-from-start", "off", "--kernel-name-base", "demangled"]
    command += ["--kernel-name", "regex:alphaext", "--target-processes", "application-only"]
    for section in SECTIONS:
        command += ["--section", section]
    return [*command, *map(str, program)]


def read_profile(text: str) -> list[dict[str, Any]]:
    """A row for each launch that the profiler printed."""
    rows: list[dict[str, Any]] = []
    case = ""
    for line in text.splitlines():
        if line.startswith("CASE "):
            case = line.removeprefix("CASE ")
        kernel = re.match(r"^  (\S.*\S) \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\), Context", line)
        if kernel:
            rows.append({"case": case, "kernel": re.sub(r"\(.*|^void |alphaext::(cuda::)?", "", kernel.group(1))})
        figure = re.match(r"^    (\S.*?)  +(\S+) +([\d,.]+)$", line)
        for name, wanted in FIGURES.items():
            if rows and figure and figure.group(1) == wanted and name not in rows[-1] and (name == "us" or "/s" not in line):
                value = float(figure.group(3).replace(",", ""))
                rows[-1][name] = value * TO_MICROSECONDS.get(figure.group(2), 1.0) if name == "us" else value
    return rows


def run_profile(context: Context) -> Outcome:
    """One launch of each main kernel."""
    profiler, looked = find_program("ncu", os.environ)
    if profiler is None:
        return Outcome(incomplete=f"ncu was not found (looked at {', '.join(looked)})")
    output, log = context.work / "profiled.json", context.work / "profile.txt"
    for path in (output, log):
        path.unlink(missing_ok=True)
    small = ["--small"] if context.emulated else []
    command = profile_command(profiler, program_command("profiled", context.device, output, *small))

    def found() -> dict[str, Any]:
        return {"kernels": read_profile(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "")}

    ran = run_process(command, context.left(), context.environment(), log, context.progress(found))
    rows = found()["kernels"]
    outcome = Outcome(None, f"{len(rows)} launches", [], {"kernels": rows}, ran.tail)
    if ran.timed_out or ran.left_behind:
        outcome.incomplete = f"{ran.fault('ncu')}; {outcome.message}"
    elif ran.returncode != 0 or not rows:
        outcome.failed = f"{ran.fault('ncu') or 'ncu printed no kernel'}; {outcome.message}"
    return outcome


def write_text(work: Path, target: Path) -> None:
    """The profiler's text as it is, where there is one."""
    log = work / "profile.txt"
    if log.exists():
        write_whole(target, log.read_text(encoding="utf-8", errors="replace"))
