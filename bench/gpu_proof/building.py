"""The extension, built for the GPU that is there; setup.py keeps it, so that a second run takes the first one's build."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_proof.preflight import ask_torch
from gpu_proof.probe import compile_probe
from gpu_proof.processes import ROOT, run_process
from gpu_proof.stages import Context, Outcome


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


def run_build(context: Context) -> Outcome:
    """The extension for this GPU alone, and beside it the probe of launches."""
    capability = str(context.machine["capability"])
    result: dict[str, Any] = {"architecture": capability}
    log = context.work / "build.log"
    log.unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as pool:
        probe = None
        if context.emulated is None:
            probe = pool.submit(compile_probe, context.work / "probe", capability, max(1.0, min(90.0, context.left())))
        command, environment = build_command(context)
        started = time.monotonic()
        built = run_process(command, context.left(), environment, log, context.progress(lambda: result))
        result["build_seconds"] = round(time.monotonic() - started, 1)
        fault = built.fault("the build")
        if fault:
            return Outcome(fault, result=result, tail=built.tail)
        kept = "nothing to compile" in built.output
        notes = []
        if probe is not None and isinstance(reason := probe.result(), str):
            notes.append(f"the probe of launches could not be compiled: {reason}")
    machine, trouble = ask_torch(context)
    trouble = trouble or str(machine.get("alphaext"))
    if not machine or trouble.startswith("not built"):
        return Outcome("what was built cannot be imported", notes=notes, result=result, tail=trouble)
    if context.emulated is None and "cuda" not in machine:
        return Outcome(f"torch {machine['torch']} sees no GPU", notes=notes, result=result)
    if context.emulated is None and str(machine["kernels_for"]).startswith("none"):
        return Outcome("the library that was built has no CUDA kernels", notes=notes, result=result)
    learnt = {key: value for key, value in machine.items() if key not in ("commit", "gpu")}
    message = f"for {capability}{', of an earlier run' if kept else ''}"
    return Outcome(None, message, notes, result, machine=learnt)
