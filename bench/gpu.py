"""One command that proves the package on a GPU: ``python bench/gpu.py``.

It asks what the machine has, builds the extension for its GPU, compares every kernel with the reference, measures the heads
beside the floor of the card, runs the GPU tests, watches the kernels with compute-sanitizer and ncu, and measures what else
there is. Each stage has a share of the time; one that fails, hangs or crashes is reported, and the rest still runs. While it
runs, and when it is ended, these files tell all that is known: NAME.json and NAME.md, the report; NAME-profile.txt, the
profiler's text; NAME-logs.tar.gz, what was printed. Exit codes: 0 all passed, 1 something failed or was not reached, 2 there
is no GPU. It needs no network; this file itself needs neither torch nor a GPU.

Where ``ALPHAEXT_EMULATED_GPU`` names a directory, the emulated GPU is built there and everything runs through at one small
size: what that shows is that this command works.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_proof.building import run_build
from gpu_proof.preflight import ask_driver, ask_torch, run_preflight
from gpu_proof.profiling import run_profile, write_text
from gpu_proof.report import merged, read_report, write_logs, write_report
from gpu_proof.sanitizers import run_sanitizers
from gpu_proof.stages import (
    BENCH,
    LIMIT_SECONDS,
    WORK,
    Context,
    Stage,
    outcome_of_program,
    program_stage,
    run_core,
    run_stages,
    select,
)
from gpu_proof.testing import run_tests

# The archive of the logs is written anew so often while a stage runs.
ARCHIVE_SECONDS = 10.0


def all_stages() -> list[Stage]:
    """The stages, in order: what decides most comes first."""
    return [
        Stage("preflight", 5, run_preflight, "what the machine has and what it lacks", needs_build=False),
        Stage("build", 200, run_build, "the extension for this GPU", needs_build=False),
        Stage("smoke", 40, lambda context: outcome_of_program(context, "smoke"), "every operator against the reference"),
        Stage("core", 45, run_core, "the package alone beside the floor of this card"),
        Stage("tests", 90, run_tests, "the GPU tests, which fail rather than be skipped"),
        Stage("sanitizers", 100, run_sanitizers, "the small cases under memcheck, racecheck, initcheck and synccheck"),
        Stage("profile", 30, run_profile, "one launch of each main kernel under ncu"),
        program_stage("large", 30, "where cuBLAS's products are faster, and very large heads"),
        program_stage("training", 45, "whole trainings, and the host's share of them"),
        program_stage("peers", 60, "the heads against their peers"),
        program_stage("compiled", 60, "the heads against what torch.compile makes"),
    ]


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
    parser.add_argument("--work", type=Path, default=WORK, help="where builds and logs lie (default: build/gpu)")
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


def find_gpu(context: Context) -> str | None:
    """Fills in what GPU there is; returns why there is none to use."""
    if context.emulated is not None:
        context.machine |= {"gpu": "emulated GPU", "capability": "9.0"}
        return None
    context.machine |= ask_driver(4.0)
    if "gpu" in context.machine:
        return None
    machine, trouble = ask_torch(context)  # nvidia-smi may be missing where torch sees a GPU all the same
    context.machine |= machine
    if "gpu" in machine:
        return None
    return f"PyTorch cannot be asked:\n{trouble}" if trouble else f"torch {machine['torch']} sees none"


class Files:
    """The files of a run, written whole whenever something is known that they do not hold yet."""

    def __init__(self, directory: Path, name: str, context: Context) -> None:
        self.directory, self.name, self.context = directory, name, context
        self.old = read_report(directory / f"{name}.json")
        self.lock = threading.Lock()  # the sanitizers report from a thread each
        self.archived = 0.0

    def write(self, entries: list[dict[str, Any]]) -> None:
        """The report; now and then, and when a stage has ended, the logs and the profile."""
        with self.lock:
            write_report(self.directory, self.name, merged(self.old, self.context.machine, entries))
            over = entries[-1]["status"] != "running"
            if over or time.monotonic() - self.archived >= ARCHIVE_SECONDS:
                self.archived = time.monotonic()
                # What cannot be archived must not end the run.
                with contextlib.suppress(OSError):
                    write_logs(self.context.work, self.directory / f"{self.name}-logs.tar.gz")
                    write_text(self.context.work, self.directory / f"{self.name}-profile.txt")


def end_politely(number: int, frame: FrameType | None) -> None:
    """A request to end becomes an exception, so that what runs is ended and the files are written."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(arguments)
    if options.list:
        for stage in options.stages:
            print(f"{stage.name:<12}{stage.seconds:4.0f} s  {stage.text}")
        return 0
    started = time.monotonic()
    emulated = os.environ.get("ALPHAEXT_EMULATED_GPU")
    context = Context({}, started + options.limit, options.work.resolve(), all_tests=options.all_tests)
    if emulated:
        context.emulated, context.device = Path(emulated).resolve(), "cpu"
    trouble = find_gpu(context)
    if trouble:
        print(f"bench/gpu.py needs a GPU, and on this machine there is none to use: {trouble}", file=sys.stderr)
        return 2
    context.machine["commit"] = options.commit or context.machine.get("commit", "unknown")
    files = Files(options.directory, options.output or default_name(context.machine), context)
    print(", ".join(f"{key} {value}" for key, value in context.machine.items()) + "\n", flush=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end_politely)
    entries: list[dict[str, Any]] = []

    def changed(so_far: list[dict[str, Any]]) -> None:
        entries[:] = so_far
        files.write(so_far)

    try:
        run_stages(options.stages, context, max(1.0, options.limit - (time.monotonic() - started)), changed)
    except KeyboardInterrupt:
        if entries and entries[-1]["status"] == "running":
            entries[-1] |= {"status": "incomplete", "message": "it was ended from outside"}
            files.write(entries)
    for entry in entries:
        print(f"{entry['name']:<12}{entry['status']:<12}{entry['seconds']:6.0f} s  {entry['message']}")
    where = files.directory / files.name
    print(f"in all {time.monotonic() - started:.0f} s; {where}.md and .json; what was printed: {where}-logs.tar.gz", flush=True)
    return 0 if all(entry["status"] == "passed" for entry in entries) and len(entries) == len(options.stages) else 1


if __name__ == "__main__":
    code = main()
    # A process that the driver holds must not hold this one.
    sys.stdout.flush()
    os._exit(code)
