"""The tables of docs/guides/sklearn.md: linear classifiers of long-tailed digits, repaired with and without a scale.

    python bench/sklearn_digits.py --results NAME [--draws 10]

Ten draws of the digits (the example of docs/guides/sklearn.md with ten seeds), each classifier after ``StandardScaler``: mean
accuracy on test images over the three few classes and over all. Writes ``bench/results/NAME.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickdraw import progress_bar
from rich.console import Console
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from alphaext.commands.demonstration import TRAIN_COUNTS
from alphaext.sklearn.classifier import AlphaNetClassifier

TEST_PER_CLASS = 50
ESTIMATORS: dict[str, Any] = {
    "LogisticRegression()": LogisticRegression(max_iter=5000),
    "LogisticRegression(C=0.01)": LogisticRegression(C=0.01, max_iter=5000),
    "LogisticRegression(C=100)": LogisticRegression(C=100, max_iter=5000),
    'LogisticRegression(class_weight="balanced")': LogisticRegression(class_weight="balanced", max_iter=5000),
    "LinearSVC()": LinearSVC(max_iter=50_000, random_state=0),
    "LinearSVC(C=0.001)": LinearSVC(C=0.001, max_iter=50_000, random_state=0),
    "SGDClassifier()": SGDClassifier(random_state=0),
    "RidgeClassifier()": RidgeClassifier(),
    'LinearDiscriminantAnalysis("lsqr", 0.1)': LinearDiscriminantAnalysis("lsqr", 0.1),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "score_scale=1": {"score_scale": 1.0},
    'preset="paper"': {"preset": "paper"},
}


def draw(seed: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Long-tailed digits: training samples and labels, test samples and labels."""
    samples, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    train, test = [], []
    for count, digit in zip(TRAIN_COUNTS, random.permutation(10), strict=True):
        indices = random.permutation(np.flatnonzero(labels == digit))
        test.append(indices[:TEST_PER_CLASS])
        train.append(indices[TEST_PER_CLASS : TEST_PER_CLASS + count])
    chosen, held = np.concatenate(train), np.concatenate(test)
    return samples[chosen], labels[chosen], samples[held], labels[held]


def accuracies(model: Any, few: np.ndarray[Any, Any], samples: Any, labels: Any) -> tuple[float, float]:
    right = model.predict(samples) == labels
    return 100 * float(right[np.isin(labels, few)].mean()), 100 * float(right.mean())


def measure(estimator: Any, seed: int) -> dict[str, tuple[float, ...]]:
    """Few and all accuracy of the plain classifier and of each way to repair it, and the scale found."""
    samples, labels, test_samples, test_labels = draw(seed)
    found: dict[str, tuple[float, ...]] = {}
    for name, options in OPTIONS.items():
        model = AlphaNetClassifier(make_pipeline(StandardScaler(), clone(estimator)), random_state=0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(samples, labels)
        found[name] = accuracies(model, model.few_classes_, test_samples, test_labels)
        if name == "auto":
            found["plain"] = accuracies(model.estimator_, model.few_classes_, test_samples, test_labels)
            found["scale"] = (float(model.score_scale_),)
    return found


def as_markdown(results: dict[str, list[dict[str, tuple[float, ...]]]], draws: int) -> str:
    columns = ("plain", *OPTIONS)
    lines = [
        "# Linear classifiers of long-tailed digits, repaired",
        "",
        f"Accuracy on test images in %, few / all, mean over {draws} draws; and the scale that `auto` found (median).",
        "",
        f"| after `StandardScaler` | {' | '.join(f'`{name}`' if name != 'plain' else name for name in columns)} | scale |",
        f"|---|{'---:|' * (len(columns) + 1)}",
    ]
    for name, found in results.items():
        cells = []
        for column in columns:
            few, everything = (statistics.fmean(entry[column][index] for entry in found) for index in (0, 1))
            cells.append(f"{few:.1f} / {everything:.1f}")
        lines.append(f"| `{name}` | {' | '.join(cells)} | {statistics.median(entry['scale'][0] for entry in found):.2g} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Repair linear classifiers of long-tailed digits.")
    parser.add_argument("--results", required=True, metavar="NAME", help="of the file in bench/results/, without .md")
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, tuple[float, ...]]]] = {}
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("classifiers", total=len(ESTIMATORS) * options.draws)
        for name, estimator in ESTIMATORS.items():
            results[name] = []
            for seed in range(options.draws):
                results[name].append(measure(estimator, seed))
                bar.advance(task)
    text = as_markdown(results, options.draws)
    target = Path(__file__).resolve().parent / "results" / f"{options.results}.md"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, target)
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
