"""Large heads on a GPU: where cuBLAS's products overtake the head in one launch, and what the rest costs beside such a product.

``python bench/gpu_large.py --output FILE`` writes JSON after each row; ``python bench/gpu.py --stage large`` runs it. Heads are
factored, the classifier is frozen: what differs between the two ways is then the product and the launches alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_limits import copy_bandwidth, usable_bytes
from gpu_timing import Task, captured, captured_backward, require_gpu, time_interleaved, write_json
from torch import Tensor
from torch.nn import functional

from alphaext.ops import head as ops

# The variable that moves the crossing point: the most scores of a head that goes in one launch.
FUSED_SCORES = "ALPHAEXT_FUSED_SCORES"
ONE_LAUNCH, PRODUCTS_APART = str(2**62), "0"


@dataclass(frozen=True)
class LargeSize:
    """A factored head's sizes."""

    batch: int
    num_classes: int
    num_few: int
    in_features: int = 2048
    hidden: int = 500
    top_k: int = 5

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.num_classes} classes, {self.num_few} few"


_CROSSING = [(64, 1000), (256, 1000), (64, 10_000), (256, 4000), (256, 10_000), (1024, 4000), (1024, 10_000), (256, 40_000)]
CROSSING = [LargeSize(batch, classes, classes // 8) for batch, classes in _CROSSING]
LARGE = [LargeSize(4096, 100_000, 30_000), LargeSize(4096, 8142, 3224)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Problem:
    """The arguments of the head, drawn at random."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    members: Tensor
    parameters: list[Tensor]
    gradient: Tensor

    def scores(self) -> Tensor:
        b1, w2, b2 = self.parameters
        return ops.alpha_head(self.input, self.weight, self.bias, self.members, None, None, b1, w2, b2, gamma=0.7)


def make_problem(size: LargeSize, device: str, dtype: torch.dtype) -> Problem:
    """Neighbours are drawn with replacement: that takes no time, and costs the kernels the same."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(dtype)

    base = size.num_classes - size.num_few
    neighbors = torch.randint(base, (size.num_few, size.top_k), generator=generator, device=device)
    own = torch.arange(base, size.num_classes, device=device).unsqueeze(1)
    shapes = [(size.num_few, size.hidden), (size.num_few, size.top_k + 1, size.hidden), (size.num_few, size.top_k + 1)]
    return Problem(
        input=draw(size.batch, size.in_features),
        weight=draw(size.num_classes, size.in_features, scale=size.in_features**-0.5),
        bias=draw(size.num_classes, scale=0.1),
        members=torch.cat([own, neighbors], dim=1),
        parameters=[draw(*shape, scale=0.05).requires_grad_() for shape in shapes],
        gradient=draw(size.batch, size.num_classes, scale=1e-3),
    )


@contextlib.contextmanager
def crossing_point(value: str) -> Iterator[None]:
    """Heads of up to so many scores go in one launch."""
    before = os.environ.get(FUSED_SCORES)
    os.environ[FUSED_SCORES] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[FUSED_SCORES]
        else:
            os.environ[FUSED_SCORES] = before


def tasks_of(problem: Problem, way: str, device: str) -> dict[str, Task]:
    """Forward, and backward to the parameters of the sub-modules (on a CPU both together).

    The way is chosen when a graph is captured.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return problem.scores()

    parameters, gradient = problem.parameters, problem.gradient
    if device == "cuda":
        with crossing_point(way):
            backward = captured_backward(problem.scores, parameters, gradient=gradient)
            return {"forward": captured(forward), "backward": backward}

    def in_its_way(function: Callable[[], object]) -> Task:
        def run() -> object:
            with crossing_point(way):
                return function()

        return Task(run)

    both = in_its_way(lambda: torch.autograd.grad(problem.scores(), parameters, gradient))
    return {"forward": in_its_way(forward), "backward": both}


def measure_crossing(size: LargeSize, dtype: str, device: str, rounds: int, budget: float) -> list[dict[str, Any]]:
    """Both ways, in turns."""
    problem = make_problem(size, device, DTYPES[dtype])
    fused, apart = tasks_of(problem, ONE_LAUNCH, device), tasks_of(problem, PRODUCTS_APART, device)
    rows = []
    for mode in fused:
        times = time_interleaved(
            {"fused": fused[mode], "apart": apart[mode]}, device, rounds=rounds, budget_seconds=budget, head_start=True
        )
        one, two = times["fused"].median_ms, times["apart"].median_ms
        rows.append({"size": str(size), "scores": size.batch * size.num_classes, "dtype": dtype, "mode": mode})
        rows[-1] |= {"one_launch_ms": one, "products_apart_ms": two, "apart_over_one_launch": two / one}
    return rows


def bytes_of_large(size: LargeSize, element: int) -> dict[str, int]:
    """What one launch of a large head reads and writes at the least, its product apart: logits in 4 bytes (of float32)."""
    scores, coefficients = size.batch * size.num_classes, size.num_few * (size.top_k + 1)
    parameters = size.num_few * size.hidden + coefficients * size.hidden + coefficients
    kept = 4 * size.num_few * size.hidden + 8 * coefficients
    forward = scores * (4 + element) + parameters * element + kept + 8 * coefficients
    # The backward reads the few classes' columns of the scores' gradient, and each logit that a class is made of once.
    columns = min(coefficients, size.num_classes)
    backward = size.batch * (size.num_few * element + 4 * columns) + 2 * parameters * element + kept
    return {"forward": forward, "backward": backward}


def measure_large(
    size: LargeSize, dtype: str, device: str, copy_bytes_per_s: float, rounds: int, budget: float
) -> list[dict[str, Any]]:
    """A large head beside the product that it holds, which PyTorch's linear layer takes, too."""
    problem = make_problem(size, device, DTYPES[dtype])

    def product() -> Tensor:
        with torch.no_grad():
            return functional.linear(problem.input, problem.weight, problem.bias)

    ours = tasks_of(problem, PRODUCTS_APART, device)
    linear = captured(product) if device == "cuda" else Task(product)
    moved = bytes_of_large(size, DTYPES[dtype].itemsize)
    rows = []
    for mode, task in ours.items():
        times = time_interleaved(
            {"ours": task, "linear": linear}, device, rounds=rounds, budget_seconds=budget, head_start=True
        )
        taken, beside = times["ours"].median_ms, times["linear"].median_ms
        rows.append({"size": str(size), "dtype": dtype, "mode": mode, "ms": taken, "linear_ms": beside})
        rows[-1] |= {"over_linear": taken / beside, "floor_of_the_rest_ms": 1e3 * moved[mode] / copy_bytes_per_s}
    return rows


def measure(
    device: str,
    output: Path | None,
    *,
    crossing: Sequence[LargeSize] = tuple(CROSSING),
    large: Sequence[LargeSize] = tuple(LARGE),
    dtypes: Sequence[str] = tuple(DTYPES),
    rounds: int = 9,
    budget: float = 0.5,
    num_bytes: int = 2**30,
) -> dict[str, Any]:
    """Both tables; the file is written after each row."""
    report: dict[str, Any] = {"crossing": [], "large": [], "errors": []}
    copy_bytes_per_s = copy_bandwidth(device, usable_bytes(device, num_bytes))

    def rows_of(table: str, size: LargeSize, dtype: str) -> list[dict[str, Any]]:
        if table == "crossing":
            return measure_crossing(size, dtype, device, rounds, budget)
        return measure_large(size, dtype, device, copy_bytes_per_s, rounds, budget)

    jobs = [
        (table, size, dtype)
        for dtype in dtypes
        for table, sizes in (("crossing", crossing), ("large", large))
        for size in sizes
    ]
    for table, size, dtype in jobs:
        try:
            report[table] += rows_of(table, size, dtype)
        except Exception as error:  # too little memory for one size leaves the others
            report["errors"].append(f"{size}, {dtype}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        write_json(output, report)
        print(f"{table}: {size}, {dtype}", flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    require_gpu(options.device)
    report = measure(options.device, options.output)
    if report["errors"]:
        raise SystemExit("\n".join(report["errors"]))


if __name__ == "__main__":
    main()
