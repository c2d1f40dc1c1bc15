"""Classes taken away from a classifier and added back from few samples: the table of docs/guides/new_classes.md.

    python bench/new_classes.py --results NAME [--draws 5]

Ten classes of at least 20 training samples, drawn at random, are taken from Caltech-101's EfficientNet-Lite0 features (from
``ALPHAEXT_DATA``) and from Banking77's TF-IDF with SVD (the examples' file), both long-tailed. Logistic regression learns the
others. Then the ten come back with 1, 2, 5 or 10 samples each: by ``add_classes``, beside nearest class mean (cosine) for all
classes, and beside logistic regression trained with these samples from the start. Writes ``bench/results/NAME.csv``, a row a
method and draw.
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
from rich.table import Table
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from alphaext import add_classes
from alphaext.baselines import ncm
from alphaext.utils.linear import make_linear
from alphaext.utils.records import write_csv

SAMPLES = (1, 2, 5, 10)
TAKEN = 10
COLUMNS = ("data", "draw", "samples", "method", "new", "old", "all", "seconds")
Data = tuple[Any, Any, Any, Any]


def caltech() -> Data:
    with np.load(Path(os.environ["ALPHAEXT_DATA"]) / "caltech101lt" / "lite0_features.npz") as file:
        return tuple(
            file[f"{part}_{what}"].astype(kind)
            for part in ("train", "test")
            for what, kind in (("features", np.float32), ("labels", np.int64))
        )  # type: ignore[return-value]


def banking() -> Data:
    texts = read_banking()
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    svd = TruncatedSVD(256, random_state=0)
    train = svd.fit_transform(vectorizer.fit_transform(texts["train"][0]))
    test = svd.transform(vectorizer.transform(texts["test"][0]))
    scale = 1 / np.sqrt(np.square(train).sum(axis=1).mean())
    return (scale * train).astype(np.float32), texts["train"][1], (scale * test).astype(np.float32), texts["test"][1]


DATA = {"caltech": (caltech, 1.0), "banking": (banking, 10.0)}


def layer_of(model: LogisticRegression) -> Any:
    return make_linear(torch.from_numpy(model.coef_.astype(np.float32)), torch.from_numpy(model.intercept_.astype(np.float32)))


def measure(name: str, data: Data, strength: float, seed: int) -> list[list[Any]]:
    features, labels, test, test_labels = data
    counts, random = np.bincount(labels), np.random.default_rng(seed)
    taken = random.choice(np.flatnonzero(counts >= 20), TAKEN, replace=False)
    order = np.argsort([*np.setdiff1d(np.arange(len(counts)), taken), *taken])
    labels, test_labels, first = order[labels], order[test_labels], len(counts) - TAKEN
    old = labels < first
    linear = layer_of(LogisticRegression(C=strength, max_iter=300).fit(features[old], labels[old]))
    lines = []
    for samples in SAMPLES:
        chosen = [random.permutation(np.flatnonzero(labels == own))[:samples] for own in range(first, len(counts))]
        new = np.concatenate(chosen)
        both = features[[*np.flatnonzero(old), *new]], labels[[*np.flatnonzero(old), *new]]
        methods = {
            "add_classes": lambda new=new: (
                add_classes(linear, features[old], labels[old], features[new], labels[new], seed=seed, progress=False).linear
            ),
            "nearest class mean": lambda both=both: ncm(*both, len(counts)),
            "from the start": lambda both=both: layer_of(LogisticRegression(C=strength, max_iter=300).fit(*both)),
        }
        for method, make in methods.items():
            started = time.monotonic()
            made = make()
            seconds = time.monotonic() - started
            with torch.no_grad():
                right = made(torch.from_numpy(test)).argmax(dim=1).numpy() == test_labels
            is_new = test_labels >= first
            accuracies = [float(right[part].mean()) for part in (is_new, ~is_new, slice(None))]
            lines.append([name, seed, samples, method, *accuracies, seconds])
            if method == "add_classes":
                assert torch.equal(made.weight[:first], linear.weight) and torch.equal(made.bias[:first], linear.bias)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Add classes to trained classifiers.")
    parser.add_argument("--results", required=True, metavar="NAME", help="of the file in bench/results/, without .csv")
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines: list[Sequence[Any]] = []
    for name, (load, strength) in DATA.items():
        data = load()
        for seed in range(options.draws):
            lines += measure(name, data, strength, seed)
            Console(stderr=True).print(name, "draw", seed)
    write_csv([COLUMNS, *lines], Path(__file__).resolve().parent / "results" / f"{options.results}.csv")
    table = Table("data", "samples", "method", "new, %", "old, %", "all, %", "seconds")
    for key in dict.fromkeys((line[0], line[2], line[3]) for line in lines):
        own = [line[4:] for line in lines if (line[0], line[2], line[3]) == key]
        means = [statistics.fmean(values) for values in zip(*own, strict=True)]
        table.add_row(*map(str, key), *(f"{100 * mean:.1f}" for mean in means[:3]), f"{means[3]:.2f}")
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
