"""What the figures were measured on: the machine, its memory bandwidth, and peak memory of a piece of work.

``python bench/machine.py`` prints the description as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Processor, memory, GPU and versions."""
    info = _build_info()
    description: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "simd": info["simd"],
        "alphaext": info["version"],
        "commit": _commit(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        description["gpu"] = torch.cuda.get_device_name()
        description["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        description["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        description["multiprocessors"] = properties.multi_processor_count
        description["driver"] = _driver()
        description["cuda"] = torch.version.cuda
        description["kernels_for"] = " ".join(info["cuda_archs"] or ["none: built without CUDA"])
    return description


def _build_info() -> dict[str, Any]:
    """What the extension tells of itself; imported here, so that a machine can be described before it is built."""
    try:
        import alphaext

        return alphaext.build_info()
    except ImportError as error:
        return {"simd": "unknown", "version": f"not built: {error}", "cuda_archs": None}


def _driver() -> str:
    """The version of NVIDIA's driver."""
    path = Path("/proc/driver/nvidia/version")
    if path.exists():
        match = re.search(r"\b(\d{3}\.[\d.]+)\b", path.read_text())
        if match:
            return match.group(1)
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.partition("\n")[0].strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system.

    Otherwise every step of a provider with large gradients pays for the pages of its gradients anew, by the luck of its
    allocations' sizes; this gives every provider its best. Elsewhere than on glibc it does nothing.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


def seconds_to_read(
    tensor: torch.Tensor, repeats: int = 7, seconds: Callable[[Callable[[], object], int], float] | None = None
) -> float:
    """The time to read ``tensor`` from memory once: the median of the fastest of several ways to do it.

    ``seconds(way, repeats)`` times one way; by default the clock does (:func:`median_seconds`).
    """
    flat = tensor.reshape(-1)
    rows = flat.view(-1, tensor.shape[-1])
    vector = torch.ones(rows.shape[1], dtype=rows.dtype, device=rows.device)
    ways: list[Callable[[], object]] = [flat.sum, flat.amax, lambda: torch.mv(rows, vector)]
    return min((seconds or median_seconds)(way, repeats) for way in ways)


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class PeakMemory:
    """Peak memory of the process (or of the GPU) above what it had at the start, in MiB; None where it cannot be read."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
            self.before = _status_mib("VmRSS")
        except OSError:
            self.before = float("nan")

    def above_start(self) -> float | None:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return None if self.before != self.before else _status_mib("VmHWM") - self.before


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"{name} is not in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps(describe()))
