"""What a recommendation is worth: the regret of ``alphaext.recommend`` on test samples, over draws, sets and classifiers.

    python bench/recommend.py --results NAME [--draws 3]

Caltech-101's EfficientNet-Lite0 features and Banking77's TF-IDF with SVD (both from ``ALPHAEXT_DATA``, long-tailed), logistic
regression trained plainly and with balanced class weights. Regret is the accuracy over all test samples of the best method of
the table (which only the test samples tell) less that of the recommended one. A draw splits training and validation samples
together anew, with as many of each class. Writes ``bench/results/NAME.csv``, a row a classifier and draw.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from banking import read_banking
from rich.console import Console
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from alphaext import repair
from alphaext.repairing.recommend import makers_of, recommend
from alphaext.utils.linear import make_linear
from alphaext.utils.records import write_csv

COLUMNS = (
    *("data", "class_weight", "draw", "recommended", "all_recommended", "best", "all_best", "all_original", "all_few"),
    *("regret", "seconds", "seconds_few"),
)


def caltech(seed: int) -> list[Any]:
    with np.load(Path(os.environ["ALPHAEXT_DATA"]) / "caltech101lt" / "lite0_features.npz") as file:
        parts = {
            part: (file[f"{part}_features"].astype(np.float32), file[f"{part}_labels"]) for part in ("train", "val", "test")
        }
    return redrawn(parts, seed)


def banking(seed: int) -> list[Any]:
    texts = read_banking()
    texts["train"], texts["val"], texts["test"] = (
        (np.array(known, dtype=object), labels) for known, labels in (texts[part] for part in ("train", "val", "test"))
    )
    train, val, test = redrawn(texts, seed)
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit(train[0])
    svd = TruncatedSVD(256, random_state=0).fit(vectorizer.transform(train[0]))
    made = [(svd.transform(vectorizer.transform(known)), labels) for known, labels in (train, val, test)]
    scale = 1 / np.sqrt(np.square(made[0][0]).sum(axis=1).mean())
    return [((scale * known).astype(np.float32), labels) for known, labels in made]


def redrawn(parts: dict[str, Any], seed: int) -> list[Any]:
    """Training and validation samples split anew, as many of each class as there were; and the test samples."""
    (train, labels), (val, val_labels) = parts["train"], parts["val"]
    both, ids, random = np.concatenate([train, val]), np.concatenate([labels, val_labels]), np.random.default_rng(seed)
    is_train = np.zeros(len(ids), dtype=bool)
    for label, count in enumerate(np.bincount(labels)):
        is_train[random.permutation(np.flatnonzero(ids == label))[:count]] = True
    return [(both[is_train], ids[is_train]), (both[~is_train], ids[~is_train]), parts["test"]]


DATA = {"caltech": (caltech, 1.0), "banking": (banking, 10.0)}


def measure(name: str, weight: str | None, seed: int) -> list[Any]:
    load, strength = DATA[name]
    (features, labels), (val, val_labels), (test, test_labels) = load(seed)
    model = LogisticRegression(C=strength, max_iter=300, class_weight=weight).fit(features, labels)
    coef, intercept = (torch.from_numpy(values.astype(np.float32)) for values in (model.coef_, model.intercept_))
    linear = make_linear(coef, intercept)
    started = time.monotonic()
    found = recommend(linear, features, labels, val, val_labels, seed=seed)
    seconds = time.monotonic() - started
    started = time.monotonic()
    repair(linear, features, labels, val_features=val, val_labels=val_labels, seed=seed, progress=False)
    seconds_few = time.monotonic() - started
    accuracies = {}
    data = {"features": features, "labels": labels, "split": found.split}
    for method, make in makers_of(linear, data, seed).items():
        if not next(each.error for each in found.candidates if each.method == method):
            with torch.no_grad():
                scores = make(torch.from_numpy(val), torch.from_numpy(val_labels))(torch.from_numpy(test))
            accuracies[method] = float((scores.argmax(dim=1).numpy() == test_labels).mean())
    best = max(accuracies, key=lambda method: accuracies[method])
    chosen = accuracies[found.method]
    others = [accuracies["original"], accuracies["few"], accuracies[best] - chosen, seconds, seconds_few]
    return [name, weight or "none", seed, found.method, chosen, best, accuracies[best], *others]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what a recommendation is worth.")
    parser.add_argument("--results", required=True, metavar="NAME", help="of the file in bench/results/, without .csv")
    parser.add_argument("--draws", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines, console = [], Console(width=150)
    for name in DATA:
        for weight in (None, "balanced"):
            for seed in range(options.draws):
                lines.append(measure(name, weight, seed))
                console.print(*lines[-1][:4], *(f"{100 * value:.1f}" for value in (lines[-1][4], lines[-1][6], lines[-1][9])))
    write_csv([COLUMNS, *lines], Path(__file__).resolve().parent / "results" / f"{options.results}.csv")
    regret, ratio = (
        statistics.fmean(values) for values in ([line[9] for line in lines], [line[10] / line[11] for line in lines])
    )
    console.print(f"mean regret {100 * regret:.2f} points over {len(lines)}; {ratio:.1f} times as long as preset few alone")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
