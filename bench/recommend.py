"""What a recommendation is worth: the regret of ``alphaext.recommend`` on test samples, over draws, sets and classifiers.

    python bench/recommend.py --results NAME [--draws 3 4 5 6 7] [--without-validation]

The sets, draws and classifiers of ``bench/method.py``. Regret is the accuracy over all test samples of the best method of the
table (which only the test samples tell) less that of the recommended one. What makes a tie was chosen on draws from 10 on of
digits, Caltech and BANKING77. Writes ``bench/results/NAME.csv``, a row a set, draw and classifier.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from long_tailed_sets import MANY_ABOVE, problem_of
from method import CLASSIFIERS, SETS
from quickdraw import default_cache
from rich.console import Console

from alphaext import recommend, repair, split_classes
from alphaext.repairing.recommend import METHODS, Makers
from alphaext.training.builder import Builder
from alphaext.utils.records import write_csv

COLUMNS = (
    *("data", "classifier", "draw", "recommended", "all_recommended", "best", "all_best", "all_original", "all_few", "all_all"),
    *("regret", "seconds", "seconds_few"),
)


def measure(name: str, classifier: str, draw: int, cache: Path, validation: bool) -> list[Any]:
    problem = problem_of(name, draw, cache)
    linear, train = problem.classifiers[classifier], (problem.features["train"], problem.labels["train"])
    split = split_classes(problem.counts, many_above=MANY_ABOVE.get(name, 100))
    val: dict[str, Any] = {"val_features": problem.features["val"], "val_labels": problem.labels["val"]}
    started = time.monotonic()
    found = recommend(linear, *train, **(val if validation else {}), split=split, seed=draw)
    seconds = time.monotonic() - started
    makers, layers = Makers(linear, Builder(linear, *train, split=split), draw), {"original": linear}
    for method in METHODS:
        started = time.monotonic()
        if method in ("few", "paper", "all"):
            layers[method] = repair(linear, *train, **val, split=split, preset=method, seed=draw, progress=False).linear
        elif not next(each.error for each in found.candidates if each.method == method):
            layers[method] = makers.layer(method, makers.numbers(method, *val.values()))
        if method == "few":
            seconds_few = time.monotonic() - started
    right = {}
    for method, layer in (*layers.items(), ("recommended", found.linear)):
        with torch.no_grad():
            answers = layer(problem.features["test"]).argmax(dim=1)
        right[method] = float((answers == problem.labels["test"]).double().mean())
    chosen = right.pop("recommended")
    best = max(right, key=lambda method: right[method])
    own = [right[method] for method in ("original", "few", "all")]
    return [name, classifier, draw, found.method, chosen, best, right[best], *own, right[best] - chosen, seconds, seconds_few]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what a recommendation is worth.")
    parser.add_argument("--results", required=True, metavar="NAME", help="of the file in bench/results/, without .csv")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--draws", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--without-validation", action="store_true", help="recommend by training samples alone")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="features and classifiers (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines, console = [], Console(width=150)
    for name in options.sets:
        for draw in options.draws:
            for classifier in CLASSIFIERS:
                lines.append(measure(name, classifier, draw, options.cache, not options.without_validation))
                line = dict(zip(COLUMNS, lines[-1], strict=True))
                shown = (f"{100 * line[column]:.1f}" for column in ("all_recommended", "all_best", "all_few", "all_all"))
                console.print(*lines[-1][:4], *shown, f"{line['seconds'] / line['seconds_few']:.1f}")
    write_csv([COLUMNS, *lines], Path(__file__).resolve().parent / "results" / f"{options.results}.csv")
    for name, own in ((each, [line for line in lines if line[0] == each]) for each in options.sets):
        console.print(f"{name}: mean regret {100 * statistics.fmean(line[-3] for line in own):.2f} points")
    mean, all_rows = (
        statistics.fmean(values) for values in ([line[-3] for line in lines], [line[6] - line[9] for line in lines])
    )
    ratio = statistics.median(line[-2] / line[-1] for line in lines)
    console.print(f"mean regret {100 * mean:.2f} points over {len(lines)}, of always taking preset all {100 * all_rows:.2f}")
    console.print(f"median time {ratio:.1f} times that of preset few alone")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
