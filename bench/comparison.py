"""The paper's Table 1 on data that fit here: every baseline, the cheap rivals, and an Alpha Net on each of three classifiers.

    python bench/comparison.py --results NAME [--seeds 0 1 2 3 4]

trains on the features of ``bench/quickdraw.py`` (345 classes of drawings made long-tailed) and writes
``bench/results/NAME.json`` and ``NAME.md``: top-1 and top-5 of few, medium, many and all classes on test images, mean and
standard deviation over the seeds, a seed being another draw of rare classes, images and network.

What a method leaves open is chosen by its accuracy over all validation images, from a handful of candidates for each method,
and never by test images. The drawings have at most 80 training images a class: "many" are here the classes with more than 40.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe
from quickdraw import ATTRIBUTION, Problem, default_cache, load_problem, problem_path, progress_bar
from rich.console import Console
from torch import nn

from alphaext import ClassSplit, fit_many, split_classes
from alphaext.baselines import run_baseline
from alphaext.metrics import predict, split_metrics

MANY_ABOVE = 40
SPLITS = ("few", "medium", "many", "all")
GAMMAS = (0.3, 0.5, 0.7, 0.9, 1.0)
RETRAINING: dict[str, dict[str, Any]] = {
    "crt": {"epochs": 15, "batch_size": 64, "weight_decay": 5e-4},
    "lws": {"epochs": 15, "batch_size": 64, "weight_decay": 5e-4},
}
LRS = (0.05, 0.1, 0.2, 0.4, 0.8)
NCM_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"metric": "euclidean"}, {"center": True, "normalize": True})
# The paper's own form: PyTorch's start, a class that leaves the interval never returns.
PAPER = {"init": "default", "projected_gradient": False}


@dataclass
class Candidate:
    """A classifier, what was chosen to make it, and its accuracy on validation images."""

    linear: nn.Module
    chosen: dict[str, Any]
    validation: dict[str, float]


class Trial:
    """One seed's problem, and the classifiers that methods make of it."""

    def __init__(self, problem: Problem, epochs: int = 80, retraining_epochs: int = 15, top_k: int = 5) -> None:
        self.problem = problem
        self.split: ClassSplit = split_classes(problem.counts, many_above=MANY_ABOVE)
        self.epochs, self.top_k = epochs, top_k
        self.retraining_epochs = retraining_epochs

    def measure(self, linear: nn.Module, part: str) -> dict[str, float]:
        problem = self.problem
        return split_metrics(predict(linear, problem.features[part], problem.labels[part]), self.split)

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """By validation accuracy over all; of equal ones the first."""
        return max(candidates, key=lambda candidate: candidate.validation["all"])

    def baseline(self, name: str, linear: nn.Module | None = None, **options: Any) -> Candidate:
        problem = self.problem
        made = run_baseline(
            name,
            problem.features["train"],
            problem.labels["train"],
            linear=linear,
            val_features=problem.features["val"],
            val_labels=problem.labels["val"],
            split=self.split,
            progress=False if name in RETRAINING else None,
            **options,
        )
        return Candidate(made.linear, {**options, **made.chosen}, self.measure(made.linear, "val"))

    def retrained(self, name: str, linear: nn.Module) -> Candidate:
        options = RETRAINING[name] | {"epochs": self.retraining_epochs, "seed": self.problem.seed}
        return self.best([self.baseline(name, linear, **options, lr=lr) for lr in LRS])

    def alpha(self, linear: nn.Module, **options: Any) -> Candidate:
        problem = self.problem
        common = {"seed": problem.seed, "epochs": self.epochs, "top_k": self.top_k, "keep_original": False, **options}
        runs = fit_many(
            linear,
            problem.features["train"],
            problem.labels["train"],
            [{**common, "gamma": gamma} for gamma in reversed(GAMMAS)],
            val_features=problem.features["val"],
            val_labels=problem.labels["val"],
            split=self.split,
            progress=False,
        )
        made = [(run.head.fold(), run) for run in runs if run.head is not None and run.result is not None]
        return self.best(
            [
                Candidate(
                    folded, {"gamma": run.config["gamma"], "epoch": run.result.selected_epoch}, self.measure(folded, "val")
                )
                for folded, run in made
                if run.result is not None
            ]
        )

    def methods(self) -> Iterator[tuple[str, Candidate]]:
        """Every method's classifier, by its name in the table."""
        joint = self.problem.classifiers["joint"]
        yield "Joint", Candidate(joint, {}, self.measure(joint, "val"))
        yield "NCM", self.best([self.baseline("ncm", **options) for options in NCM_OPTIONS])
        yield "tau-normalised", self.baseline("tau", joint)
        crt, lws = self.retrained("crt", joint), self.retrained("lws", joint)
        yield "cRT", crt
        yield "LWS", lws
        yield "logit adjustment", self.baseline("logit-adjustment", joint)
        bases = {"Joint": joint, "cRT": crt.linear, "LWS": lws.linear}
        for name, linear in bases.items():
            yield f"{name} + one few bias", self.baseline("few-bias", linear)
        for name, linear in bases.items():
            yield f"Alpha-{name}, paper's form", self.alpha(linear, **PAPER)
        for name, linear in bases.items():
            yield f"Alpha-{name}", self.alpha(linear)


METHODS = 15


def measure_problem(problem: Problem, report: Callable[[], None] = lambda: None, **options: int) -> list[dict[str, Any]]:
    """A row for each method: what was chosen, and its sixteen accuracies on validation and test images."""
    trial = Trial(problem, **options)
    rows = []
    for name, candidate in trial.methods():
        rows.append(
            {
                "method": name,
                "seed": problem.seed,
                "chosen": candidate.chosen,
                "validation": candidate.validation,
                "test": trial.measure(candidate.linear, "test"),
            }
        )
        report()
    return rows


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and for each method of whom something was chosen, what."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "# Baselines, rivals and Alpha Nets on QuickDraw-345",
        "",
        f"Accuracy on test images in %, top-1 [top-5], mean ± standard deviation over {len(seeds)} seeds. Few: fewer than 20",
        f"training images, many: more than {MANY_ABOVE}. What a method leaves open is chosen by the accuracy over all",
        f"validation images. {ATTRIBUTION}",
        "",
        "| method | few | medium | many | all | all, less the classifier it starts from |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    for method, own in by_method.items():
        cells = [_cell([row["test"][split] for row in own], [row["test"][f"{split}_top5"] for row in own]) for split in SPLITS]
        base = next((name for name in ("cRT", "LWS", "Joint") if name in method and name != method), None)
        gain = ""
        if base is not None:
            pairs = zip(own, by_method[base], strict=True)
            gain = _spread([row["test"]["all"] - start["test"]["all"] for row, start in pairs], sign="+")
        lines.append(f"| {method} | {' | '.join(cells)} | {gain} |")
    lines += ["", "Chosen on validation images:", ""]
    for method, own in by_method.items():
        chosen = [", ".join(f"{key} {_short(value)}" for key, value in row["chosen"].items() if key in _SHOWN) for row in own]
        if any(chosen):
            lines.append(f"- {method}: {'; '.join(text or 'the first candidate' for text in chosen)}")
    return "\n".join(lines) + "\n"


_SHOWN = ("tau", "lr", "gamma", "offset", "metric", "center", "epoch")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _spread(values: Sequence[float], sign: str = "") -> str:
    numbers = [100 * value for value in values]
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.fmean(numbers):{sign}.1f} ± {spread:.1f}"


def _cell(top1: Sequence[float], top5: Sequence[float]) -> str:
    return f"{_spread(top1)} [{_spread(top5)}]"


def write_results(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write NAME.json and NAME.md, each whole or not at all."""
    report = {"attribution": ATTRIBUTION, "machine": describe(), "many_above": MANY_ABOVE, "rows": list(rows)}
    for target, text in (
        (path.with_suffix(".json"), json.dumps(report, indent=1)),
        (path.with_suffix(".md"), as_markdown(rows)),
    ):
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text if text.endswith("\n") else text + "\n")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare baselines, rivals and Alpha Nets on QuickDraw-345.")
    parser.add_argument(
        "--results", required=True, metavar="NAME", help="of the files in bench/results/, without .json and .md"
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of bench/quickdraw.py (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1, for the products are small)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    try:
        problems = [load_problem(problem_path(options.cache, seed)) for seed in dict.fromkeys(options.seeds)]
        with progress_bar(Console(stderr=True)) as bar:
            task = bar.add_task("methods", total=METHODS * len(problems))
            for problem in problems:
                bar.update(task, description=f"seed {problem.seed}")
                rows += measure_problem(problem, lambda: bar.advance(task))
        path = Path(__file__).resolve().parent / "results" / options.results
        write_results(rows, path)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written")
        return 130
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"comparison: {error}", markup=False, soft_wrap=True)
        return 1
    Console().print(as_markdown(rows), highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
