"""The limits of the card that the figures are held against: bandwidths, the cost of a launch, matrix rates."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import seconds_to_read

from gpu_proof.parts import Part
from gpu_proof.probe import ROOT, compile_probe
from gpu_proof.timing import Task, captured, time_interleaved

# Far more than any cache holds.
COPY_BYTES, SMALL_BYTES = 2**31, 2**18
MATRIX_SIZE, SMALL_MATRIX = 8192, 32
# Where the probe is compiled.
PROBE = ROOT / "build" / "gpu" / "probe"


def _median_ms(function: Callable[[], object], device: str, rounds: int = 15) -> float:
    return time_interleaved({"": Task(function)}, device, rounds=rounds)[""].median_ms


def rounded(value: float) -> float:
    """Four digits of it."""
    return float(f"{value:.4g}")


def usable_bytes(device: str, wanted: int = COPY_BYTES) -> int:
    """As much as is wanted, but no more than an eighth of what the card has free."""
    if device != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info()
    return min(wanted, free // 8)


def copy_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes a second of a copy within the device's memory, read and written bytes both counted."""
    count = num_bytes // 4
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * count / (1e-3 * _median_ms(lambda: target.copy_(source), device))


def read_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes a second of reading the device's memory: the best of several of PyTorch's ways to do it."""
    columns = 4096
    tensor = torch.randn(max(1, num_bytes // 4 // columns), columns, device=device)
    return tensor.numel() * 4 / seconds_to_read(tensor, 9, lambda way, rounds: 1e-3 * _median_ms(way, device, rounds))


def matrix_rate(device: str, kind: str, size: int) -> float:
    """Operations a second of a square matrix product in "float32", "tf32" or "bfloat16", on random data."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        return 2 * size**3 / (1e-3 * _median_ms(lambda: left @ right, device))
    finally:
        torch.set_float32_matmul_precision(before)


def smallest_kernel_us(device: str) -> float:
    """Microseconds of PyTorch's smallest kernel, in a graph of 100."""
    one = torch.zeros(1, device=device)
    task = captured(lambda: one.fill_(1.0), 100) if device == "cuda" else Task(lambda: one.fill_(1.0))
    return 1000 * time_interleaved({"": task}, device, head_start=True)[""].median_ms


def launch_costs(directory: Path = PROBE) -> dict[str, Any]:
    """What the compiled probe measures: an empty launch, and a cooperative one with a single barrier of the whole grid."""
    program = compile_probe(directory, "{}.{}".format(*torch.cuda.get_device_capability()))
    if isinstance(program, str):
        raise RuntimeError(f"there is no probe: {program}")
    finished = subprocess.run([str(program), "limits"], capture_output=True, text=True, timeout=60, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"the probe failed: {finished.stderr.strip()[-300:]}")
    costs: dict[str, Any] = json.loads(finished.stdout)
    return costs


def memory_and_launches(device: str, small: bool) -> Iterator[Part]:
    """What the tables of the heads and of the training are held against."""

    def bandwidth(measure: Callable[[str, int], float]) -> float:
        return rounded(measure(device, SMALL_BYTES if small else usable_bytes(device)) / 1e9)

    yield Part("copy_gb_per_s", lambda: bandwidth(copy_bandwidth))
    if device == "cuda":
        yield Part("launches", launch_costs)
    yield Part("read_gb_per_s", lambda: bandwidth(read_bandwidth))


def rates(device: str, small: bool) -> Iterator[Part]:
    """Matrix rates, and PyTorch's own smallest kernel."""
    size = SMALL_MATRIX if small else MATRIX_SIZE
    for kind in ("float32", "tf32", "bfloat16"):
        yield Part(f"{kind}_tflop_per_s", lambda kind=kind: rounded(matrix_rate(device, kind, size) / 1e12))
    yield Part("smallest_torch_kernel_us", lambda: rounded(smallest_kernel_us(device)))
