"""What the machine has, asked in seconds and without importing torch; a sentence for all that is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_proof.processes import run_process
from gpu_proof.stages import BENCH, Context, Outcome

# Program -> what is lost without it.
PROGRAMS = {
    "nvcc": "nothing can be built",
    "g++": "nothing can be built",
    "compute-sanitizer": "the sanitizers do not run",
    "ncu": "no kernel is profiled",
}
# Package -> (the oldest version that will do, what is lost without it).
PACKAGES = {
    "torch": ("2.10", "nothing runs"),
    "setuptools": ("77", "nothing can be built"),
    "pybind11": ("2.13", "nothing can be built"),
    "ninja": ("1", "nothing can be built, unless ninja is on PATH"),
    "numpy": ("1.24", "nothing runs"),
    "scikit-learn": ("1.3", "nothing runs"),
    "rich": ("13", "nothing runs"),
    "pytest": ("8.2", "no test runs"),
    "expecttest": ("0", "the tests with opcheck are left out"),
    "hypothesis": ("6.100", "the tests that draw their inputs are left out"),
    "pytest-xdist": ("3", "tests run one after another"),
}


def find_program(name: str, environment: Mapping[str, str], root: Path = Path("/")) -> tuple[Path | None, list[str]]:
    """A program on PATH or in a CUDA toolkit, and the places that were looked at."""
    looked = ["PATH"]
    on_path = shutil.which(name, path=environment.get("PATH", ""))
    if on_path:
        return Path(on_path), looked
    homes = [Path(environment[key]) for key in ("CUDA_HOME", "CUDA_PATH") if environment.get(key)]
    homes += [root / "usr/local/cuda", *sorted((root / "usr/local").glob("cuda-*"), reverse=True)]
    homes += sorted((root / "opt/nvidia/nsight-compute").glob("*"), reverse=True)
    for home in homes:
        looked.append(str(home))
        for path in (home / "bin" / name, home / name, home / name / name, home / "extras" / name / name):
            if os.access(path, os.X_OK) and path.is_file():
                return path, looked
    return None, looked


def said_by(command: list[str | Path], seconds: float) -> str | None:
    """What a command prints, or None where it cannot or does not end well in time."""
    try:
        ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout if ran.returncode == 0 else None


def version_of(name: str, seconds: float) -> tuple[str | None, str]:
    """A program's version, and a sentence where it is missing or does not answer."""
    path, looked = find_program(name, os.environ)
    if path is None:
        return None, f"{name} was not found (looked at {', '.join(looked)}): {PROGRAMS[name]}."
    text = said_by([path, "--version"], seconds)
    if text is None:
        return None, f"{path} --version does not answer: {PROGRAMS[name]}."
    versions = re.findall(r"\d+\.\d[\w.]*", text)
    return (versions[-1] if name == "nvcc" and versions else versions[0] if versions else "unknown"), ""


def numbers(version: str) -> tuple[int, ...]:
    """A version's leading numbers, so that versions can be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def version_of_package(name: str) -> tuple[str | None, str]:
    """A package's version, and a sentence where it is missing or too old."""
    oldest, loss = PACKAGES[name]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        wheel = name if oldest == "0" else f'"{name}>={oldest}"'
        return None, f"{name} is not installed: {loss}. Carry it along as a wheel: pip download --no-deps {wheel}"
    if numbers(version) < numbers(oldest):
        carry = f'Carry a newer one along as a wheel: pip download --no-deps "{name}>={oldest}"'
        return version, f"{name} is {version}, and {oldest} is the oldest that will do: {loss}. {carry}"
    return version, ""


def ask_driver(seconds: float) -> dict[str, Any]:
    """The GPU as the driver names it; empty where nvidia-smi cannot say."""
    names = {"gpu": "name", "capability": "compute_cap", "driver": "driver_version", "gpu_memory_mib": "memory.total"}
    command = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits"]
    text = said_by(command, seconds)
    fields = [] if not text else [part.strip() for part in text.splitlines()[0].split(",")]
    return dict(zip(names, fields, strict=True)) if len(fields) == len(names) else {}


def ask_torch(context: Context) -> tuple[dict[str, Any], str]:
    """What bench/machine.py says of the machine, which imports torch; empty with the reason where it cannot say."""
    ran = run_process(
        [sys.executable, BENCH / "machine.py"], min(60.0, context.left()), context.environment(), context.work / "machine.log"
    )
    lines = [line for line in ran.output.splitlines() if line.startswith("{")]
    if ran.returncode != 0 or not lines:
        return {}, ran.tail
    machine: dict[str, Any] = json.loads(lines[-1])
    return machine, ""


def run_preflight(context: Context) -> Outcome:
    """Versions, and what is missing."""
    seconds = max(1.0, min(4.0, context.left()))
    with ThreadPoolExecutor() as pool:
        programs = dict(zip(PROGRAMS, pool.map(lambda name: version_of(name, seconds), PROGRAMS), strict=True))
        packages = dict(zip(PACKAGES, pool.map(version_of_package, PACKAGES), strict=True))
    answers = {**programs, **packages}
    versions = {"Python": platform.python_version()} | {name: version or "missing" for name, (version, _) in answers.items()}
    missing = [sentence for _, sentence in answers.values() if sentence]
    hopeless = [name for name in ("torch", "nvcc", "g++", "setuptools", "pybind11", "numpy") if answers[name][1]]
    outcome = Outcome(notes=missing, result=versions, message=f"{len(answers) - len(missing)} of {len(answers)} are there")
    if hopeless and context.emulated is None:
        outcome.failed = f"{', '.join(hopeless)} missing or too old"
    elif missing:
        outcome.incomplete = outcome.message
    return outcome
