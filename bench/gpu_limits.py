"""The limits of the card that the figures are held against: bandwidths, matrix rates, the cost of a launch.

``python bench/gpu_limits.py --output FILE`` writes JSON after each measurement; ``python bench/gpu.py --stage limits`` runs it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_probe import compile_probe
from gpu_timing import Task, captured, time_interleaved, write_json
from machine import seconds_to_read

# Far more than any cache holds.
COPY_BYTES = 2**31
MATRIX_SIZE = 8192


def _median_ms(function: Callable[[], object], device: str, rounds: int = 15) -> float:
    return time_interleaved({"": Task(function)}, device, rounds=rounds)[""].median_ms


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


def launch_costs(directory: Path) -> dict[str, Any]:
    """What the compiled probe measures: an empty launch, and a cooperative one with a single barrier of the whole grid."""
    program = compile_probe(directory, "{}.{}".format(*torch.cuda.get_device_capability()))
    if isinstance(program, str):
        return {"probe": f"left out: {program}"}
    finished = subprocess.run([str(program), "limits"], capture_output=True, text=True, timeout=60, check=False)
    if finished.returncode != 0:
        return {"probe": f"failed: {finished.stderr.strip()[-300:]}"}
    costs: dict[str, Any] = json.loads(finished.stdout)
    return costs


def measure(
    device: str, output: Path | None, directory: Path, *, num_bytes: int = COPY_BYTES, size: int = MATRIX_SIZE
) -> dict[str, Any]:
    """Every limit; the file is written after each."""
    limits: dict[str, Any] = {}
    num_bytes = usable_bytes(device, num_bytes)
    steps: list[tuple[str, Callable[[], float]]] = [
        ("copy_gb_per_s", lambda: copy_bandwidth(device, num_bytes) / 1e9),
        ("read_gb_per_s", lambda: read_bandwidth(device, num_bytes) / 1e9),
        ("float32_tflop_per_s", lambda: matrix_rate(device, "float32", size) / 1e12),
        ("tf32_tflop_per_s", lambda: matrix_rate(device, "tf32", size) / 1e12),
        ("bfloat16_tflop_per_s", lambda: matrix_rate(device, "bfloat16", size) / 1e12),
        ("smallest_torch_kernel_us", lambda: smallest_kernel_us(device)),
    ]
    for name, step in steps:
        limits[name] = float(f"{step():.4g}")
        print(f"{name} {limits[name]}", flush=True)
        write_json(output, limits)
    if device == "cuda":
        limits.update(launch_costs(directory))
        write_json(output, limits)
    return limits


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--directory", type=Path, default=Path("build/gpu/probe"), help="where the probe is compiled")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a GPU: torch sees none")
    print(json.dumps(measure(options.device, options.output, options.directory)))


if __name__ == "__main__":
    main()
