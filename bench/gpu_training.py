"""Whole trainings on a GPU: the persistent kernel against the cost of a launch and against its best rival in Python.

``python bench/gpu_training.py --output FILE`` writes JSON after each part; ``python bench/gpu.py --stage training`` runs it.
Problems are those of bench/training.py: published class counts, features and classifiers drawn at random.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import training
from gpu_timing import Task, captured, require_gpu, time_interleaved, write_json
from torch import nn

import alphaext
from alphaext.training.native_engine import NativeEngine

FEW_CLASSES = (10, 100, 1_000, 10_000)
GAMMAS = tuple(round(0.1 * i, 1) for i in range(1, 10))


def epoch_ms(problem: training.Problem, device: str, rounds: int = 9) -> tuple[float, int]:
    """Milliseconds of one epoch's launch in a CUDA graph (eagerly on a CPU), and its steps."""
    run = problem.run(epochs=1, lr=1e-3, select="last")
    run.prepare(None, None, native=True)
    engine = run.engine
    assert isinstance(engine, NativeEngine)
    rows = engine.rows_of(1)
    task = task_of(lambda: engine._launch(rows, 1e-3), device)
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
    return {
        "steps": native["steps"],
        "training_s": native["training_s"],
        "prepare_s": training.timed(lambda: run.prepare(None, None, native=True)),
        "validation_ms": native["validation_ms"],
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
    return {"runs": len(runs), "seconds": seconds, "failed": [run.error for run in runs if run.error]}


def step_by_few_classes(counts: Sequence[int], device: str) -> dict[str, float]:
    """Microseconds of a step with so many few classes; the state of the last ones fits into no shared memory."""
    base = training.Dataset("scaling", 1136, 136, 1643, 6000, 64, in_features=64, pca_dim=500)
    found = {}
    for few in counts:
        samples = max(few, 1280)
        dataset = replace(base, num_classes=few + 1000, num_few=few, few_samples=samples, samples=samples + 4000)
        milliseconds, steps = epoch_ms(training.make_problem(dataset, device), device)
        found[str(few)] = 1e3 * milliseconds / steps
    return found


def measure(
    device: str,
    output: Path | None,
    *,
    datasets: Sequence[training.Dataset] = tuple(training.DATASETS.values()),
    few_classes: Sequence[int] = FEW_CLASSES,
    repeats: int = 3,
    epochs: int = 80,
    seeds: int = 10,
) -> dict[str, Any]:
    """All parts; the file is written after each."""
    report: dict[str, Any] = {"trainings": {}}
    problems = [training.make_problem(dataset, device) for dataset in datasets]
    for dataset, problem in zip(datasets, problems, strict=True):
        report["trainings"][dataset.name] = whole_training(problem, device, repeats, epochs)
        write_json(output, report)
        print(f"{dataset.name}: {report['trainings'][dataset.name]}", flush=True)
    report["step_us_by_few_classes"] = step_by_few_classes(few_classes, device)
    write_json(output, report)
    report["sweep"] = sweep(problems[0], device, seeds, epochs)
    write_json(output, report)
    print(f"sweep: {report['sweep']}", flush=True)
    return report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    require_gpu(options.device)
    warnings.filterwarnings("ignore", message=".*with replacement")
    report = measure(options.device, options.output)
    if report["sweep"]["failed"]:
        raise SystemExit(f"runs of the sweep failed: {report['sweep']['failed'][0]}")


if __name__ == "__main__":
    main()
