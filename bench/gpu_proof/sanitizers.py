"""compute-sanitizer's tools over the smallest cases; what each found so far is told, whenever it ends."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_proof.parts import faults_of, read_parts, results_of
from gpu_proof.preflight import find_program
from gpu_proof.probe import compile_probe
from gpu_proof.processes import Finished, run_process
from gpu_proof.stages import Context, Outcome, program_command

# Tool -> the cases it looks at (smoke.py): what a race or a barrier can go wrong in does not depend on every dtype, and ATen's
# products would show initcheck memory that they never wrote.
TOOLS: dict[str, list[str]] = {
    "memcheck": [],
    "racecheck": ["--only", "torch.float32", "--only", "torch.bfloat16"],
    "initcheck": ["--only", "training", "--only", "validation", "--only", "one launch"],
    "synccheck": ["--only", "torch.float32", "--only", "torch.bfloat16"],
}


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


@dataclass
class Findings:
    """What a tool printed."""

    count: int | None = None  # of its summary; None where it did not come to one
    ours: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # in kernels that are not this package's


def read_findings(output: str) -> Findings:
    """The findings with the case in which each was made."""
    counts = [int(number) for number in re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)", output, re.MULTILINE)]
    found = Findings(sum(counts) if counts else None)
    blocks: list[tuple[str, list[str]]] = []
    case = ""
    for line in output.splitlines():
        if line.startswith("CASE "):
            case = line.removeprefix("CASE ")
        match = re.match(r"^=======+( +)(\S.*)$", line)
        if match is None:
            continue
        indent, text = len(match.group(1)), match.group(2)
        if indent == 1:
            blocks.append((case, [text]))
        elif blocks:
            blocks[-1][1].append(text)
    for case, (first, *rest) in blocks:
        if not re.search(r"Invalid|Misaligned|Uninitialized|Race reported|hazard detected|Barrier error|misuse", first):
            continue
        # Host frames name files, and a checkout's path may hold the package's name: only what is before them counts.
        device = []
        for text in rest:
            if text.startswith(("Host Frame", "Saved host")):
                break
            device.append(text)
        finding = "; ".join([first, *device[:2], *([f"in the case {case}"] if case else [])])
        (found.ours if any("alphaext" in text for text in [first, *device]) else found.others).append(finding)
    return found


def judge(tool: str, ran: Finished, cases: str, faults: dict[str, str]) -> tuple[str | None, str | None, list[str]]:
    """What one tool's run shows: a fault or None, what is incomplete or None, and notes."""
    found = read_findings(ran.output)
    foreign = f"{tool}: {len(found.others)} findings in kernels of others, the first: {found.others[:1]}"
    notes = [foreign] if found.others else []
    if found.ours:
        notes += [f"{tool}: {text}" for text in found.ours[:5]]
        return f"{tool}: {len(found.ours)} findings, the first: {found.ours[0]}", None, notes
    if faults:
        return f"{tool}: wrong results under it, the first: {next(iter(faults.items()))}", None, notes
    if ran.timed_out or ran.left_behind:
        return None, f"{ran.fault(tool)} after {cases}, no finding so far", notes
    if ran.returncode != 0:
        return f"{tool}: the program under it ended with code {ran.returncode}", None, notes
    if found.count is None:
        return f"{tool} printed no summary", None, notes
    if found.count and tool != "initcheck":
        return f"{tool} counts {found.count} findings", None, notes
    if found.count and not found.others:
        return f"{tool} counts {found.count} findings that could not be read", None, notes
    return None, None, notes


@dataclass
class Watched:
    """What came of one tool."""

    fault: str | None
    incomplete: str | None
    notes: list[str]
    text: str
    tail: str = ""


def so_far(output: Path, log: Path) -> str:
    """What a running tool has come to."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return f"{len(results_of(read_parts(output)))} cases so far, {len(read_findings(text).ours)} findings"


def watch(context: Context, sanitizer: Path, tool: str, probe: Path | str, found: dict[str, Any]) -> Watched:
    """The fault that was planted for a tool, which it must find, then the cases."""
    started = time.monotonic()
    # Each tensor in an allocation of its own: PyTorch's cache would hide what is out of bounds or never written. And so few
    # blocks wait for each other that all fit, whatever registers the tool takes.
    environment = context.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1", ALPHAEXT_COOPERATIVE_BLOCKS="16")
    output, log = context.work / f"{tool}.json", context.work / f"{tool}.log"
    for path in (output, log):
        path.unlink(missing_ok=True)
    if isinstance(probe, Path):
        command = sanitizer_command(sanitizer, tool, [probe, tool])
        planted = run_process(command, context.left(), environment, context.work / f"{tool}-planted.log")
        if not planted.timed_out and not read_findings(planted.output).ours:
            fault = f"{tool} did not find the fault that was planted for it"
            return Watched(fault, None, [], fault, planted.tail)
    small = ["--small"] if context.emulated else []
    program = program_command("smoke", context.device, output, "--patient", *TOOLS[tool], *small)
    told = context.progress(lambda: {**found, tool: so_far(output, log)})
    ran = run_process(sanitizer_command(sanitizer, tool, program), context.left(), environment, log, told)
    entries = read_parts(output)
    cases = f"{len(results_of(entries))} cases"
    fault, incomplete, notes = judge(tool, ran, cases, faults_of(entries))
    text = f"{fault or incomplete or 'clean'} ({cases}, {time.monotonic() - started:.0f} s)"
    return Watched(fault, incomplete, notes, text, ran.tail if fault or incomplete else "")


def run_sanitizers(context: Context) -> Outcome:
    """All tools at once."""
    sanitizer, looked = find_program("compute-sanitizer", os.environ)
    if sanitizer is None:
        return Outcome(incomplete=f"compute-sanitizer was not found (looked at {', '.join(looked)})")
    probe: Path | str = "no probe for an emulated GPU"
    if context.emulated is None:
        capability, seconds = str(context.machine["capability"]), max(1.0, min(60.0, context.left()))
        probe = compile_probe(context.work / "probe", capability, seconds)
    found: dict[str, Any] = {}

    def one(tool: str) -> Watched:
        watched = watch(context, sanitizer, tool, probe, found)
        found[tool] = watched.text
        context.report(dict(found))
        return watched

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        outcomes = dict(zip(TOOLS, pool.map(one, TOOLS), strict=True))
    faults = [watched.fault for watched in outcomes.values() if watched.fault]
    cut = [watched.incomplete for watched in outcomes.values() if watched.incomplete]
    notes = [note for watched in outcomes.values() for note in watched.notes]
    if isinstance(probe, str):
        notes.append(f"the tools were not tried on planted faults: {probe}")
    outcome = Outcome("; ".join(faults) or None, f"{len(TOOLS)} tools clean", notes, found)
    outcome.incomplete = "; ".join(cut) or None
    outcome.tail = "\n".join(watched.tail for watched in outcomes.values() if watched.tail)
    return outcome
