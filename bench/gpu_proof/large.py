"""Large heads on a GPU: where cuBLAS's products overtake the head in one launch, and what the rest costs beside such a product.

Heads are factored, the classifier is frozen: what differs between the two ways is then the product and the launches alone.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alphaext.ops import head as ops
from gpu_proof.parts import Part
from gpu_proof.timing import Task, captured, captured_backward, time_interleaved

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
TINY = LargeSize(6, 40, 5, in_features=8, hidden=7)
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


def measure_large(size: LargeSize, dtype: str, device: str, rounds: int, budget: float) -> list[dict[str, Any]]:
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
        rows[-1] |= {"over_linear": taken / beside, "bytes_of_the_rest": moved[mode]}
    return rows


def parts(
    device: str,
    small: bool,
    *,
    crossing: Sequence[LargeSize] = tuple(CROSSING),
    large: Sequence[LargeSize] = tuple(LARGE),
    dtypes: Sequence[str] = tuple(DTYPES),
    rounds: int = 9,
    budget: float = 0.5,
) -> Iterator[Part]:
    """Rows of both tables: first what decides the crossing point."""
    if small:
        crossing, large, rounds = [TINY], [TINY], 2
    for table, measured, sizes in (("crossing", measure_crossing, crossing), ("large", measure_large, large)):
        for dtype in dtypes:
            for size in sizes:
                yield Part(f"{table}: {size}, {dtype}", partial(measured, size, dtype, device, rounds, budget))
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
