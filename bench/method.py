"""Presets few and all against one constant and every rival, on four sets, several draws each, from two classifiers.

    python bench/method.py run          # measures draws 3 to 7, and makes the tables; a row that is there is not made again
    python bench/method.py tables       # the tables of the rows that there are

Preset few was chosen on draws 0 to 2 of QuickDraw, preset all on draw 0 of it and on draws from 10 on of the others.

``run`` writes ``bench/results/method/rows.csv``: a row a set, draw, classifier and method. ``tables`` writes ``summary.csv``
and ``summary.md`` beside it: means over draws, and 95% intervals of Student's t of differences, draw by draw. Networks and
features are kept (``--cache``); making them counts for nobody. Everything is chosen on validation samples.

"Above the front": accuracy over all less the best that a constant on the few scores comes to, on the test samples themselves,
with at least as much few accuracy. Where no constant has so much, the method is beyond the front.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from intervals import t_interval
from long_tailed_sets import ATTRIBUTIONS, MANY_ABOVE, problem_of
from quickdraw import Problem, default_cache
from torch import nn

from alphaext import ClassSplit, repair, split_classes
from alphaext.baselines import run_baseline
from alphaext.metrics import split_accuracy

ROOT = Path(__file__).parent / "results" / "method"
SETS = ("digits", "quickdraw", "caltech", "banking")
CLASSIFIERS = ("joint", "crt")
SPLITS = ("few", "medium", "many", "base", "all")
COLUMNS = ("set", "draw", "classifier", "method", *SPLITS, "front", "seconds", "chosen")
KEYS = COLUMNS[:4]
BEFORE, CONSTANT, FEW, ALL = "before", "few-bias", "preset few", "preset all"
RIVALS = ("ncm", "tau", "logit-adjustment", "crt", "lws", "discriminant", "average")
NEED_NO_CLASSIFIER = ("ncm", "crt", "discriminant")

Row = dict[str, Any]
Made = tuple[nn.Module, str, float]
"""A layer, what validation samples chose for it, and the seconds that it took."""


def run(sets: Sequence[str], draws: Sequence[int], wanted: Sequence[str], cache: Path) -> None:
    """Measure what the rows lack."""
    ROOT.mkdir(parents=True, exist_ok=True)
    path = ROOT / "rows.csv"
    rows = read_rows(path)
    done = {tuple(row[key] for key in KEYS) for row in rows}
    for draw in draws:
        for name in sets:
            without_classifier: dict[str, Made] = {}  # what needs no classifier is made once for both
            for classifier in CLASSIFIERS:
                missing = [each for each in wanted if (name, str(draw), classifier, each) not in done]
                if not missing:
                    continue
                measured = Measured(problem_of(name, draw, cache), classifier, without_classifier)
                for method in missing:
                    rows.append({"set": name, "draw": str(draw), "classifier": classifier, **measured.row(method)})
                    write_rows(path, COLUMNS, rows)
                print(f"{name}, draw {draw}, {classifier}", file=sys.stderr, flush=True)


def methods() -> list[str]:
    return [BEFORE, CONSTANT, *RIVALS, "preset paper", FEW, ALL]


class Measured:
    """A problem and one of its classifiers, and what each method makes of it."""

    def __init__(self, problem: Problem, classifier: str, without_classifier: dict[str, Made]) -> None:
        self.without_classifier = without_classifier
        self.problem, self.linear = problem, problem.classifiers[classifier]
        self.split: ClassSplit = split_classes(problem.counts, many_above=MANY_ABOVE.get(problem.name, 100))
        self.train = (problem.features["train"], problem.labels["train"])
        self.val = {"val_features": problem.features["val"], "val_labels": problem.labels["val"]}
        self.front = front(self.scores(self.linear), problem.labels["test"], self.split)

    @torch.no_grad()
    def scores(self, layer: nn.Module) -> torch.Tensor:
        scores: torch.Tensor = layer(self.problem.features["test"])
        return scores

    def row(self, method: str) -> Row:
        layer, chosen, seconds = self.without_classifier.get(method) or self.timed(method)
        if method in NEED_NO_CLASSIFIER:
            self.without_classifier[method] = layer, chosen, seconds
        labels = self.problem.labels["test"]
        found = split_accuracy(self.scores(layer), labels, self.split)
        few = float(torch.isin(labels, self.split.few).float().mean())
        found["base"] = (found["all"] - few * found["few"]) / (1 - few)
        cells = {part: f"{100 * found[part]:.3f}" for part in SPLITS}
        height = self.front(found["few"])
        return {
            "method": method,
            **cells,
            "front": "" if height is None else f"{100 * height:.3f}",
            "seconds": f"{seconds:.2f}",
            "chosen": chosen,
        }

    def timed(self, method: str) -> Made:
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer, chosen = self.make(method)
        return layer, chosen, time.monotonic() - started

    def make(self, method: str) -> tuple[nn.Module, str]:
        """The layer, and what validation samples chose for it."""
        if method == BEFORE:
            return self.linear, ""
        if method.startswith("preset "):
            preset = method.removeprefix("preset ")
            made = repair(
                self.linear, *self.train, **self.val, split=self.split, preset=preset, seed=self.problem.seed, progress=False
            )
            return made.linear, "" if made.average is None else str(made.average.settings)
        given = {} if method in NEED_NO_CLASSIFIER else {"linear": self.linear}
        options = {"seed": self.problem.seed, "progress": False} if method in ("crt", "lws") else {}
        baseline = run_baseline(method, *self.train, **given, **self.val, split=self.split, **options)
        return baseline.linear, str(baseline.chosen or baseline.settings)


def front(scores: torch.Tensor, labels: torch.Tensor, split: ClassSplit) -> Callable[[float], float | None]:
    """The best accuracy over all of a constant with at least a given few accuracy; None where no constant has that."""
    is_few = torch.zeros(scores.shape[1], dtype=torch.bool)
    is_few[split.few] = True
    best_few, few_ids = scores.masked_fill(~is_few, -torch.inf).max(dim=1)
    best_base, base_ids = scores.masked_fill(is_few, -torch.inf).max(dim=1)
    # Above this constant the sample is answered with its best few class.
    order = (best_base - best_few).argsort()
    few_right, base_right = (few_ids == labels)[order], (base_ids == labels)[order]
    few_hits = np.concatenate([[0], few_right.cumsum(0).numpy()])
    hits = few_hits + int(base_right.sum()) - np.concatenate([[0], base_right.cumsum(0).numpy()])
    few = few_hits / int(is_few[labels].sum())
    overall = hits / len(labels)

    def at(few_accuracy: float) -> float | None:
        enough = few >= few_accuracy - 1e-9
        return float(overall[enough].max()) if enough.any() else None

    return at


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summarize(rows: Sequence[Row]) -> list[Row]:
    """A row a set, classifier and method: means over its draws, and differences on the draws that both methods have."""
    found: list[Row] = []
    for name in SETS:
        for classifier in CLASSIFIERS:
            of: dict[str, dict[str, Row]] = {}
            for row in rows:
                if (row["set"], row["classifier"]) == (name, classifier):
                    of.setdefault(row["method"], {})[row["draw"]] = row
            found += [_summary(name, classifier, method, of) for method in methods() if {method, CONSTANT, FEW} <= set(of)]
    return found


def _summary(name: str, classifier: str, method: str, of: dict[str, dict[str, Row]]) -> Row:
    own = of[method]
    row: Row = {"set": name, "classifier": classifier, "method": method, "draws": len(own)}
    row |= {part: f"{np.mean([float(each[part]) for each in own.values()]):.2f}" for part in SPLITS}
    for other in (CONSTANT, FEW):
        shared = sorted(set(own) & set(of[other]), key=int)
        for part in ("few", "all"):
            differences = [float(own[draw][part]) - float(of[other][draw][part]) for draw in shared]
            row |= _cells(f"{part} less {other}", differences) if differences else {}
    heights = [float(each["all"]) - float(each["front"]) for each in own.values() if each["front"]]
    row |= _cells("above the front", heights) if heights else {}
    row["beyond the front"] = len(own) - len(heights)
    return row


def _cells(name: str, differences: Sequence[float]) -> Row:
    mean, low, high = t_interval(differences)
    return {name: f"{mean:.2f}", f"{name}, low": f"{low:.2f}", f"{name}, high": f"{high:.2f}"}


def goals(summary: Sequence[Row]) -> list[str]:
    """What was aimed at, row by row, and whether it was reached."""
    lines = [
        "| set | classifier | few: more few than few-bias | few: all not below | few: above or beyond the front "
        "| all: all not below few's | all: above few's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, classifier in dict.fromkeys((row["set"], row["classifier"]) for row in summary):
        of = {row["method"]: row for row in summary if (row["set"], row["classifier"]) == (name, classifier)}
        if ALL not in of:
            continue
        few, everything = of[FEW], of[ALL]
        height = float(few.get("above the front, low", "nan"))
        beyond = int(few["beyond the front"]) == int(few["draws"])
        answers = (
            float(few[f"few less {CONSTANT}"]) > 0,
            float(few[f"all less {CONSTANT}, high"]) >= 0,
            beyond or height > 0,
            float(everything[f"all less {FEW}, high"]) >= 0,
            float(everything[f"all less {FEW}, low"]) > 0,
        )
        lines.append(f"| {name} | {classifier} | {' | '.join('yes' if answer else 'no' for answer in answers)} |")
    return lines


def markdown(summary: Sequence[Row]) -> str:
    lines = [
        "# Presets few and all against one constant and every rival",
        "",
        f"Top-1 on test samples, %, means over {max(int(row['draws']) for row in summary)} draws; differences in points, "
        "draw by draw, with 95% intervals of Student's t. *few-bias* is one constant on the few scores. Everything is chosen "
        "on validation samples, but the front's constants, which are chosen on the test samples themselves. "
        f"{' '.join(ATTRIBUTIONS.values())}",
        "",
        *compact(summary),
        "",
        "| set | classifier | method | few | medium | many | base | all | few less few-bias | all less few-bias "
        "| all less preset few | above the front |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    compared = (f"few less {CONSTANT}", f"all less {CONSTANT}", f"all less {FEW}", "above the front")
    for row in summary:
        cells = [_shown(row, name) for name in compared]
        if int(row["beyond the front"]):
            cells[-1] = f"{cells[-1]}; {row['beyond the front']} beyond".removeprefix("; ")
        names = (row["set"], row["classifier"], row["method"])
        lines.append(f"| {' | '.join([*names, *(row[part] for part in SPLITS), *cells])} |")
    return "\n".join([*lines, "", *goals(summary), ""])


def compact(summary: Sequence[Row]) -> list[str]:
    """Few and all accuracy of every method, a column a set and classifier."""
    places = {(row["set"], row["classifier"]): row["draws"] for row in summary if row["method"] == FEW}
    lines = [
        f"| few / all | {' | '.join(f'{name}, {classifier}' for name, classifier in places)} |",
        f"|---|{'---:|' * len(places)}",
    ]
    of = {(row["method"], row["set"], row["classifier"]): row for row in summary}
    for method in methods():
        cells = []
        for place, draws in places.items():
            row = of.get((method, *place))
            cells.append("" if row is None else f"{float(row['few']):.1f} / {float(row['all']):.1f}")
            if row is not None and row["draws"] != draws:
                cells[-1] += f" ({row['draws']} of {draws} draws)"
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _shown(row: Row, name: str) -> str:
    if name not in row:
        return ""
    return f"{float(row[name]):+.2f} ({float(row[f'{name}, low']):+.2f} to {float(row[f'{name}, high']):+.2f})"


def tables(draws: Sequence[int]) -> None:
    summary = summarize([row for row in read_rows(ROOT / "rows.csv") if int(row["draw"]) in draws])
    if not summary:
        print("no table yet: there are no rows of preset few and of the constant")
        return
    columns = list(dict.fromkeys(name for row in summary for name in row))
    write_rows(ROOT / "summary.csv", columns, summary)
    (ROOT / "summary.md").write_text(markdown(summary))
    print((ROOT / "summary.md").read_text())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Presets few and all against one constant and every rival.")
    parser.add_argument("what", choices=("run", "tables"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--draws", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--methods", nargs="+", choices=methods(), default=methods())
    parser.add_argument("--cache", type=Path, default=default_cache(), help="features and classifiers (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.what == "run":
        run(options.sets, options.draws, options.methods, options.cache)
    tables(options.draws)
    return 0


if __name__ == "__main__":
    sys.exit(main())
