"""README's picture: what became of every rare class of Caltech-101's photographs.

    ALPHAEXT_DATA=DATA python bench/picture.py docs/images/caltech.png

A draw of the long-tailed photographs that no preset was chosen on, EfficientNet-Lite0's features, a classifier trained in the
plain way, and preset ``all``; test samples.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib
import numpy as np
from long_tailed_sets import ATTRIBUTIONS, problem_of

from alphaext import repair, split_classes
from alphaext.metrics import per_class, predict
from alphaext.utils.files import whole_file

DRAW = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--cache", type=Path, help="where problems are kept")
    options = parser.parse_args()
    problem = problem_of("caltech", DRAW, options.cache)
    split, original = split_classes(problem.counts), problem.classifiers["joint"]
    inputs, labels = problem.features, problem.labels
    made = repair(
        original, inputs["train"], labels["train"], val_features=inputs["val"], val_labels=labels["val"], preset="all"
    )
    before, after = (
        100 * per_class(predict(layer, inputs["test"], labels["test"], progress=False)) for layer in (original, made.linear)
    )
    names = (Path(os.environ["ALPHAEXT_DATA"]) / "caltech101lt" / "classes.txt").read_text().splitlines()
    draw(options.output, [name.replace("_", " ") for name in names], split.few.numpy(), np.asarray(before), np.asarray(after))


def draw(output: Path, names: list[str], few: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    order = few[np.argsort(before[few] + 1e-3 * after[few], kind="stable")]
    places = np.arange(len(order))
    figure, axes = plt.subplots(figsize=(10, 4.6), layout="constrained")
    better, worse = after[order] > before[order], after[order] < before[order]
    axes.vlines(places[better], before[order][better], after[order][better], color="#2a9d8f", linewidth=3)
    axes.vlines(places[worse], before[order][worse], after[order][worse], color="#d1495b", linewidth=3)
    axes.plot(places, before[order], "o", color="#8d99ae", markersize=5, label=f"before: {before[few].mean():.0f}%")
    axes.plot(places, after[order], "o", color="#1d3557", markersize=5, label=f"repaired: {after[few].mean():.0f}%")
    axes.set_xticks(places, [names[class_id] for class_id in order], rotation=90, fontsize=9)
    axes.set(ylabel="recognised, % of test photographs", ylim=(-3, 103), xlim=(-1, len(order)))
    axes.set_title(f"The {len(few)} rare classes of Caltech-101, long-tailed", fontsize=12)
    axes.legend(loc="lower right", fontsize=11)
    axes.text(0.995, 0.33, ATTRIBUTIONS["caltech"], transform=axes.transAxes, ha="right", fontsize=8, color="gray")
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as file:
        figure.savefig(file, format="png", dpi=130)


if __name__ == "__main__":
    main()
