"""The table of docs/guides/sklearn.md: linear classifiers of long-tailed bank customers' questions, plain and repaired.

    python bench/estimators.py --results NAME [--draws 5]

Banking77 (the examples' file), TF-IDF in the same pipeline as the classifier. A draw takes as many questions of each class
as the long-tailed list has, from training and validation questions together. Writes ``bench/results/NAME.csv``, a row a preset
and draw, and prints the mean with a 95% t interval of what the repair gains.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from banking import draw, read_banking
from intervals import t_interval
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from alphaext.sklearn.classifier import AlphaNetClassifier
from alphaext.utils.records import write_csv

ESTIMATORS: dict[str, Any] = {
    "LogisticRegression": LogisticRegression(max_iter=1000),
    "LinearSVC": LinearSVC(random_state=0),
    "SGDClassifier": SGDClassifier(random_state=0),
    "RidgeClassifier": RidgeClassifier(),
}
COLUMNS = (
    *("estimator", "class_weight", "preset", "draw", "few_before", "few_after", "all_before", "all_after", "repaired"),
    *("seconds_plain", "seconds_repaired"),
)


def measure(estimator: Any, texts: Any, seed: int, preset: str) -> list[Any]:
    (train, labels), (test, test_labels) = draw(texts, seed)
    few = np.isin(test_labels, np.flatnonzero(np.bincount(labels) < 20))
    started = time.monotonic()
    make_pipeline(TfidfVectorizer(sublinear_tf=True), estimator).fit(train, labels)
    plain = time.monotonic() - started
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.monotonic()
        pipeline = make_pipeline(TfidfVectorizer(sublinear_tf=True), estimator)
        model = AlphaNetClassifier(pipeline, preset=preset, random_state=seed)
        model.fit(train, labels)
        repaired = time.monotonic() - started
    right = [each.predict(test) == test_labels for each in (model.estimator_, model)]
    accuracies = [float(hits[part].mean()) for part in (few, slice(None)) for hits in right]
    return [*accuracies, model.repaired_, plain, repaired]


def interval(values: Sequence[float]) -> str:
    """The mean in points, and half of its 95% t interval."""
    mean, low, _ = t_interval(values)
    return f"{100 * mean:+.1f} ±{100 * (mean - low):.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Repair scikit-learn's linear classifiers of texts.")
    parser.add_argument("--results", required=True, metavar="NAME", help="of the file in bench/results/, without .csv")
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    texts, lines = read_banking(), [COLUMNS]
    table = Table("estimator", "class_weight", "preset", "few before", "few after", "gain", "all before", "all after", "gain")
    for name, estimator in ESTIMATORS.items():
        for weight, preset in itertools.product((None, "balanced"), ("few", "all")):
            own = [measure(estimator.set_params(class_weight=weight), texts, seed, preset) for seed in range(options.draws)]
            lines += [(name, weight or "none", preset, seed, *values) for seed, values in enumerate(own)]
            few, few_after, total, total_after = ([values[column] for values in own] for column in range(4))
            cells = []
            for before, after in ((few, few_after), (total, total_after)):
                gains = [b - a for a, b in zip(before, after, strict=True)]
                cells += [f"{100 * statistics.fmean(before):.1f}", f"{100 * statistics.fmean(after):.1f}", interval(gains)]
            table.add_row(name, weight or "none", preset, *cells)
            Console(stderr=True).print(name, weight, preset, *cells)
    write_csv(lines, Path(__file__).resolve().parent / "results" / f"{options.results}.csv")
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
