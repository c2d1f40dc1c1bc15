"""Times by CUDA events, replays of CUDA graphs, and what else the measuring scripts share; on a CPU, the clock times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Cycles that the GPU spins before a timed replay, about 0.1 ms: meanwhile the CPU submits the replay, so that its own time
# stays out of the figure.
HEAD_START_CYCLES = 200_000


@dataclass
class Task:
    """Something to time: ``run`` does the work ``steps`` times over, ``prepare`` what must precede it untimed."""

    run: Callable[[], object]
    steps: int = 1
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Times:
    """What one task's repeats took, in milliseconds a step."""

    median_ms: float
    iqr_ms: float
    rounds: int


def summarise(milliseconds: Sequence[float]) -> Times:
    """Median and quartile range."""
    if len(milliseconds) < 2:
        return Times(milliseconds[0], 0.0, len(milliseconds))
    low, middle, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Times(middle, high - low, len(milliseconds))


def require_gpu(device: str) -> None:
    """End the program with a sentence where there is no GPU, or no code for it."""
    if device != "cuda":
        return
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU: torch sees none")
    import alphaext

    if alphaext.build_info()["cuda"] is None:
        raise SystemExit("needs a GPU build: this one has CPU kernels only. `python bench/gpu.py --stage build` makes one")


def time_once(task: Task, device: str, head_start: bool = False) -> float:
    """Milliseconds a step of one run."""
    if task.prepare is not None:
        task.prepare()
    if device != "cuda":
        started = time.perf_counter()
        task.run()
        return 1000 * (time.perf_counter() - started) / task.steps
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if head_start:
        torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    task.run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / task.steps


def time_interleaved(
    tasks: dict[str, Task], device: str, *, rounds: int = 15, budget_seconds: float = 2.0, head_start: bool = False
) -> dict[str, Times]:
    """Each task's times: in every round each runs once, so that whatever disturbs the machine disturbs all alike.

    Where a task's data exceeds the cache, the others have driven it out by the time that its turn comes again. Rounds become
    fewer, but not fewer than 5, where they would take longer than the budget.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    for task in tasks.values():
        time_once(task, device, head_start)
    started = time.perf_counter()
    milliseconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds):
        if number >= 5 and time.perf_counter() - started > budget_seconds:
            break
        for name, task in tasks.items():
            milliseconds[name].append(time_once(task, device, head_start))
    return {name: summarise(values) for name, values in milliseconds.items()}


def warm_up_stream(function: Callable[[], object], stream: torch.cuda.Stream, times: int = 3) -> None:
    """Run on a side stream, as must precede a capture: what is allocated or compiled once is then done."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def captured(function: Callable[[], object], steps: int = 1) -> Task:
    """A CUDA graph of ``steps`` calls."""
    stream = torch.cuda.Stream()
    warm_up_stream(function, stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(steps):
            function()
    return Task(graph.replay, steps)


def captured_backward(
    forward: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], steps: int = 1, gradient: torch.Tensor | None = None
) -> Task:
    """A CUDA graph of ``steps`` backward passes alone, of a loss or of a result with its gradient.

    Their forward is a graph of its own, replayed before, untimed.
    """
    stream = torch.cuda.Stream()
    warm_up_stream(lambda: torch.autograd.grad(forward(), inputs, gradient), stream)
    before, graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(before, stream=stream):
        losses = [forward() for _ in range(steps)]
    # One pool: what the forward saved must stay where the backward reads it.
    with torch.cuda.graph(graph, pool=before.pool(), stream=stream):
        while losses:
            torch.autograd.grad(losses.pop(0), inputs, gradient)
    return Task(graph.replay, steps, before.replay)
