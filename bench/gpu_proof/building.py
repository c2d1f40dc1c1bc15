"""The extension, built for the GPU that is there; a second run takes the first one's build."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_proof.parts import read_parts
from gpu_proof.preflight import ask_torch, version_of, version_of_package
from gpu_proof.probe import compile_probe
from gpu_proof.processes import ROOT, run_process
from gpu_proof.report import write_whole
from gpu_proof.stages import Context, Outcome

SOURCES = ("csrc/**/*", "build_support/*.py", "setup.py", "pyproject.toml", "tests/cpp/*shim*", "tests/emulated_gpu.py")


def fingerprint(capability: str, versions: str) -> str:
    """Of all that a build depends on: contents, not times, which a copied tree has new."""
    digest = hashlib.sha256(f"{capability} {versions} {sys.version}".encode())
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def build_command(context: Context) -> tuple[list[str | Path], dict[str, str]]:
    """What builds it, and in which environment."""
    if context.emulated is not None:
        return [sys.executable, ROOT / "tests" / "emulated_gpu.py", context.emulated], context.environment()
    environment = context.environment(
        ALPHAEXT_CUDA="1",
        TORCH_CUDA_ARCH_LIST=str(context.machine["capability"]),
        MAX_JOBS=str(os.cpu_count() or 1),  # by cores: what memory is free says little on a machine that has just started
        NVCC_APPEND_FLAGS="-lineinfo",  # so that sanitizers and profiler name lines
    )
    return [sys.executable, "setup.py", "build_ext", "--inplace", f"--build-temp={context.work / 'objects'}"], environment


def built_library(context: Context) -> Path | None:
    """The library that a build made, if it is there."""
    place = context.emulated if context.emulated is not None else ROOT / "alphaext"
    return next(iter(sorted(place.glob("_C*.so"))), None)


def run_build(context: Context) -> Outcome:
    """The extension for this GPU alone, and beside it the probe of launches."""
    capability = str(context.machine["capability"])
    result: dict[str, Any] = {"architecture": capability}
    record = context.work / "build.record.json"
    wanted = fingerprint(capability, f"{version_of('nvcc', 4)} {version_of_package('torch')}")
    library, known = built_library(context), read_parts(record)
    with ThreadPoolExecutor(1) as pool:
        probe = None
        if context.emulated is None:
            probe = pool.submit(compile_probe, context.work / "probe", capability, max(1.0, min(90.0, context.left())))
        reused = library is not None and known.get("fingerprint") == wanted and known.get("size") == library.stat().st_size
        if reused:
            result["build"] = "that of an earlier run: its sources are the same"
        else:
            command, environment = build_command(context)
            log = context.work / "build.log"
            log.unlink(missing_ok=True)
            started = time.monotonic()
            built = run_process(command, context.left(), environment, log, context.progress(lambda: result))
            result["build_seconds"] = round(time.monotonic() - started, 1)
            fault = built.fault("the build")
            if fault:
                return Outcome(fault, result=result, tail=built.tail)
            library = built_library(context)
            if library is None:
                return Outcome("the build left no library", result=result, tail=built.tail)
            write_whole(record, json.dumps({"fingerprint": wanted, "size": library.stat().st_size}))
        notes = []
        if probe is not None and isinstance(reason := probe.result(), str):
            notes.append(f"the probe of launches could not be compiled: {reason}")
    machine, trouble = ask_torch(context)
    if not machine:
        return Outcome("what was built cannot be imported", notes=notes, result=result, tail=trouble)
    if context.emulated is None and "cuda" not in machine:
        return Outcome(f"torch {machine['torch']} sees no GPU", notes=notes, result=result)
    if context.emulated is None and str(machine["kernels_for"]).startswith("none"):
        return Outcome("the library that was built has no CUDA kernels", notes=notes, result=result)
    learnt = {key: value for key, value in machine.items() if key not in ("commit", "gpu")}
    return Outcome(None, f"for {capability}", notes, result, machine=learnt)
