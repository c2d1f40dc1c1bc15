"""Whole trainings on a GPU: the persistent kernel against the cost of a launch and against its best rival in Python.

Problems are those of bench/training.py: published class counts, features and classifiers drawn at random.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import training
from torch import nn

import alphaext
from alphaext.training.native_engine import NativeEngine
from gpu_proof.parts import Part
from gpu_proof.timing import Task, captured, time_interleaved

FEW_CLASSES = (10, 100, 1_000, 10_000)
# For a single epoch: the sizes of ImageNet-LT, but few validation samples, which take time to draw.
ONE_EPOCH = replace(training.DATASETS["imagenet-lt"], samples=6_000, val_samples=1_000)
TINY = training.Dataset("tiny", 40, 6, 50, 1000, 70, in_features=16, pca_dim=8, top_k=3)
GAMMAS = tuple(round(0.1 * i, 1) for i in range(1, 10))


def epoch_ms(problem: training.Problem, device: str, rounds: int = 9) -> tuple[float, int]:
    """Milliseconds of one epoch's launch in a CUDA graph (eagerly on a CPU), and its steps."""
    run = problem.run(epochs=1, lr=1e-3, select="last")
    run.prepare(None)
    engine = run.engine
    assert isinstance(engine, NativeEngine)
    rows = engine.rows_of(1).to(engine.device)
    task = task_of(lambda: engine.train_rows(rows, 1e-3), device)
    return time_interleaved({"": task}, device, rounds=rounds)[""].median_ms, engine.steps_per_epoch


def task_of(function: Callable[[], object], device: str, steps: int = 1) -> Task:
    """So many calls in a CUDA graph; on a CPU one, as it is."""
    return captured(function, steps) if device == "cuda" else Task(function)


def rival_step_ms(problem: training.Problem, device: str) -> float:
    """A step of the identities in plain tensor operations, captured in a graph: the best that Python alone can do."""
    step = training.eager_factored_step(problem)
    return time_interleaved({"": task_of(step, device, 20)}, device)[""].median_ms


def whole_training(problem: training.Problem, device: str, repeats: int, epochs: int) -> dict[str, Any]:
    """Preparation, then every epoch with a validation, as ``fit`` does them; and what a step of it takes."""
    native = training.native_training(problem, repeats, epochs=epochs)
    run = problem.run(epochs=epochs, lr=0.01, select="best_all")
    milliseconds, steps = epoch_ms(problem, device)
    rival = rival_step_ms(problem, device)
    on_gpu_s = 1e-3 * epochs * (milliseconds + native["validation_ms"])
    return {
        "steps": native["steps"],
        "training_s": native["training_s"],
        "prepare_s": training.timed(lambda: run.prepare(None)),
        "validation_ms": native["validation_ms"],
        "host_s": native["training_s"] - on_gpu_s,
        "step_us": 1e3 * milliseconds / steps,
        "rival_step_us": 1e3 * rival,
        "faster_than_rival": rival * steps / milliseconds,
        "shared_s": training.native_training(training.make_shared(problem), 1, epochs=epochs)["training_s"],
    }


def sweep(problem: training.Problem, device: str, seeds: int, epochs: int) -> dict[str, Any]:
    """Nine gammas times some seeds, from features to trained heads."""
    linear = nn.Linear(problem.head.in_features, problem.head.out_features, device=device)
    linear.load_state_dict({"weight": problem.head.weight, "bias": problem.head.bias})
    configs = [dict(gamma=gamma, seed=seed, lr=0.01, epochs=epochs) for gamma in GAMMAS for seed in range(seeds)]
    means = torch.randn(problem.head.out_features, problem.head.in_features, device=device)
    runs: list[Any] = []
    seconds = training.timed(
        lambda: runs.extend(
            alphaext.fit_many(
                linear, problem.features, problem.labels, configs,
                val_features=problem.val_features, val_labels=problem.val_labels, means=means,
            )
        )
    )  # fmt: skip
    failed = [run.error for run in runs if run.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed, the first: {failed[0]}")
    return {"runs": len(runs), "seconds": seconds}


def step_us(few: int, device: str, pca_dim: int = 500) -> float:
    """Microseconds of a step with so many few classes; the state of the last ones fits into no shared memory."""
    base = training.Dataset("scaling", 1136, 136, 1643, 6000, 64, in_features=64, pca_dim=pca_dim)
    samples = max(few, 1280)
    dataset = replace(base, num_classes=few + 1000, num_few=few, few_samples=samples, samples=samples + 4000)
    milliseconds, steps = epoch_ms(training.make_problem(dataset, device), device)
    return 1e3 * milliseconds / steps


def epoch_parts(device: str, small: bool) -> Iterator[Part]:
    """One epoch of training: the step."""

    def one_epoch() -> dict[str, Any]:
        milliseconds, steps = epoch_ms(training.make_problem(TINY if small else ONE_EPOCH, device), device)
        return {"epoch_ms": milliseconds, "steps": steps, "step_us": 1e3 * milliseconds / steps}

    yield Part("training: an epoch", one_epoch)


def parts(device: str, small: bool) -> Iterator[Part]:
    """Whole trainings, then steps by the number of few classes, then the sweep."""
    datasets = [TINY] if small else list(training.DATASETS.values())
    repeats, epochs, seeds = (1, 2, 1) if small else (3, 80, 10)
    problem_of = cache(lambda name: training.make_problem({d.name: d for d in datasets}[name], device))
    for dataset in datasets:
        work = lambda name: whole_training(problem_of(name), device, repeats, epochs)  # noqa: E731
        yield Part(f"training: {dataset.name}", partial(work, dataset.name), 40.0)
    for few, pca_dim in [(5, 8)] if small else [(few, 500) for few in FEW_CLASSES]:
        yield Part(f"step: {few} few classes", partial(step_us, few, device, pca_dim))
    yield Part("sweep", lambda: sweep(problem_of(datasets[0].name), device, seeds, epochs), 60.0)
    problem_of.cache_clear()
    gc.collect()
