"""One launch of each main kernel, for a profiler that counts between cudaProfilerStart and Stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import training
from head.providers import PROVIDERS, make_problem

from alphaext.training.native_engine import NativeEngine
from gpu_proof import heads, large, trainings
from gpu_proof.parts import Part


def profiled(prepare: Callable[[], Callable[[], object]], device: str) -> None:
    """Prepare, run twice unseen, then once for the profiler."""
    work = prepare()
    for _ in range(2):
        work()
    if device != "cuda":
        return
    runtime = torch.cuda.cudart()
    torch.cuda.synchronize()
    runtime.cudaProfilerStart()
    work()
    torch.cuda.synchronize()
    runtime.cudaProfilerStop()


def head(provider: str, dtype: str, mode: str, device: str, small: bool) -> Callable[[], object]:
    """The head at ImageNet-LT's size; of a backward pass, the forward as well."""
    problem = make_problem((heads.TINY if small else heads.LARGEST)[0], device, heads.DTYPES[dtype])
    make, cached_logits = PROVIDERS[provider]
    return heads.make_step(make(problem), problem, cached_logits, mode)


def large_head(device: str, small: bool) -> Callable[[], object]:
    """A large head, forward and backward."""
    problem = large.make_problem(large.TINY if small else large.LARGE[1], device, torch.float32)

    def step() -> None:
        with large.crossing_point(large.PRODUCTS_APART):
            torch.autograd.grad(problem.scores(), problem.parameters, problem.gradient)

    return step


def epoch(device: str, small: bool) -> Callable[[], object]:
    """An epoch of training."""
    problem = training.make_problem(trainings.TINY if small else trainings.ONE_EPOCH, device)
    run = problem.run(epochs=1, lr=1e-3, select="last")
    run.prepare(None)
    engine = run.engine
    assert isinstance(engine, NativeEngine)
    rows = engine.rows_of(1).to(engine.device)
    return lambda: engine.train_rows(rows, 1e-3)


def parts(device: str, small: bool) -> Iterator[Part]:
    """The kernels, those first whose figures decide most."""
    works: dict[str, Callable[[], Callable[[], object]]] = {
        "training, an epoch": partial(epoch, device, small),
        "dense, float32, forward and backward": partial(head, "alphaext dense", "float32", "forward+backward", device, small),
        "dense, bfloat16, forward": partial(head, "alphaext dense", "bfloat16", "forward", device, small),
        "factored, float32, forward and backward": partial(
            head, "alphaext factored", "float32", "forward+backward", device, small
        ),
        "large, float32, forward and backward": partial(large_head, device, small),
    }
    for name, prepare in works.items():
        yield Part(name, partial(profiled, prepare, device), 0.0)
