"""Which rule, init, gamma, clamp and learning rate should be the defaults: trains a head for each combination and compares.

    python bench/quickdraw.py --cache DIRECTORY
    python bench/defaults.py --cache DIRECTORY --output NAME

writes ``NAME.json``, one row for each combination, classifier and seed, and ``NAME.md``, its means over the seeds. A
combination whose row is in ``NAME.json`` is not trained again, so an interrupted run goes on where it was, and a larger grid
adds to it.

The epoch is selected by the accuracy over all validation images; so are, in the first table of ``NAME.md``, gamma and the
learning rate. All accuracies shown are of test images. What the last epoch would have given is beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe
from quickdraw import (
    ATTRIBUTION,
    CLASSIFIERS,
    SPLITS,
    Problem,
    default_cache,
    digits_problem,
    load_problem,
    problem_path,
    progress_bar,
)
from rich.console import Console

from alphaext import AlphaNet, class_means, fit_many, split_classes
from alphaext.metrics import split_accuracy

PROBLEMS = ("digits", "quickdraw")
TOP_K = 5
# Heads held at a time, and lost if interrupted.
_TRAINED_TOGETHER = 40
STATES = ("before", "selected", "last")
Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """One combination. ``"l1"`` has neither gamma nor clamp: there they are None and False."""

    rule: str
    init: str
    projected_gradient: bool
    gamma: float | None
    lr: float
    epochs: int


@dataclass
class Trained:
    """What training gave: the heads of the selected and of the last epoch, or None if it diverged."""

    selected: AlphaNet | None
    selected_epoch: int | None
    last: AlphaNet | None
    seconds: float


def make_grid(
    rules: Sequence[str],
    inits: Sequence[str],
    projected: Sequence[bool],
    gammas: Sequence[float],
    lrs: Sequence[float],
    epochs: int,
) -> list[Config]:
    """All combinations, each once."""
    grid = [
        Config(rule, init, False, None, lr, epochs)
        if rule == "l1"
        else Config(rule, init, projected_gradient, gamma, lr, epochs)
        for rule, init, projected_gradient, gamma, lr in itertools.product(rules, inits, projected, gammas, lrs)
    ]
    return list(dict.fromkeys(grid))


def options_of(problem: Problem, config: Config) -> dict[str, Any]:
    """A configuration as :func:`alphaext.fit_many` wants it."""
    options = {name: value for name, value in asdict(config).items() if value is not None}
    return options | {"top_k": TOP_K, "seed": problem.seed, "keep_original": False}


def train_all(
    problem: Problem, classifier: str, configs: Sequence[Config], jobs: int | None = None
) -> Iterator[tuple[Config, Trained]]:
    """Train a head for each of ``configs`` on the same features, twice: kept as selected, and kept to its end."""
    features, labels = problem.features, problem.labels
    means = class_means(features["train"], labels["train"], len(problem.counts))
    for start in range(0, len(configs), _TRAINED_TOGETHER):
        started = time.monotonic()
        some = configs[start : start + _TRAINED_TOGETHER]
        runs = fit_many(
            problem.classifiers[classifier],
            features["train"],
            labels["train"],
            [options_of(problem, config) | {"select": select} for select in ("best_all", "last") for config in some],
            val_features=features["val"],
            val_labels=labels["val"],
            means=means,
            jobs=jobs,
            progress=False,
        )
        seconds = (time.monotonic() - started) / len(some)
        for config, selected, last in zip(some, runs[: len(some)], runs[len(some) :], strict=True):
            epoch = None if selected.result is None else selected.result.selected_epoch
            yield config, Trained(selected.head, epoch, last.head, seconds)


def make_row(problem: Problem, classifier: str, config: Config, trained: Trained) -> Row:
    """Accuracies (fractions of 1; None where there is nothing to average) and clamped classes of one training."""
    row: Row = {
        "problem": problem.name,
        "classifier": classifier,
        "seed": problem.seed,
        "data": fingerprint(problem),
        **asdict(config),
        "num_few": int((problem.counts < 20).sum()),
        "selected_epoch": trained.selected_epoch,
        "diverged": trained.last is None,
        "seconds": round(trained.seconds, 3),
    }
    heads = {"selected": trained.selected, "last": trained.last}
    for part in ("val", "test"):
        accuracies = {"before": problem.accuracy(classifier, part)}
        for state, head in heads.items():
            accuracies[state] = dict.fromkeys(SPLITS, math.nan) if head is None else head_accuracy(problem, head, part)
        for state, split in itertools.product(STATES, SPLITS):
            accuracy = accuracies[state][split]
            row[f"{part}_{split}_{state}"] = None if math.isnan(accuracy) else accuracy
    for state, head in heads.items():
        row[f"clamped_{state}"] = None if head is None else int(head.clamped().sum())
    return row


@torch.no_grad()
def head_accuracy(problem: Problem, head: AlphaNet, part: str) -> dict[str, float]:
    return split_accuracy(head(problem.features[part]), problem.labels[part], split_classes(problem.counts))


def fingerprint(problem: Problem) -> str:
    """Of all that training and testing read: rows of other features must not be mixed with these."""
    digest = hashlib.sha256()
    for tensors in (problem.features, problem.labels):
        for part in sorted(tensors):
            digest.update(tensors[part].contiguous().numpy().tobytes())
    for name in sorted(problem.classifiers):
        for parameter in problem.classifiers[name].parameters():
            digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class Results:
    """The rows of a file: those that were there, and those that are added; written whole or not at all."""

    def __init__(self, stem: Path) -> None:
        self.json, self.markdown = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".md")
        self.rows: list[Row] = []
        if self.json.exists():
            report = json.loads(self.json.read_text())
            if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
                raise ValueError(f"{self.json} is not a file of bench/defaults.py")
            self.rows = report["rows"]
        self.saved, self.unsaved = time.monotonic(), False

    @staticmethod
    def key(problem: str, classifier: str, seed: int, config: Config) -> tuple[object, ...]:
        return problem, classifier, seed, *asdict(config).values()

    def done(self, problem: Problem) -> set[tuple[object, ...]]:
        """Keys of the rows of ``problem``; a ValueError if they were made of other features."""
        rows = [row for row in self.rows if row["problem"] == problem.name and row["seed"] == problem.seed]
        if any(row["data"] != fingerprint(problem) for row in rows):
            what = f"{problem.name}, seed {problem.seed}"
            raise ValueError(f"{self.json} has rows of other features of {what}, than these; choose another --output")
        names = list(Config.__dataclass_fields__)
        return {
            self.key(row["problem"], row["classifier"], row["seed"], Config(**{name: row[name] for name in names}))
            for row in rows
        }

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.unsaved = True
        # Not after every row: many can be made in a second, and the file is written as a whole.
        if time.monotonic() - self.saved > 5:
            self.save()

    def save(self) -> None:
        if not self.unsaved:
            return
        report = {"attribution": ATTRIBUTION, "machine": describe()}
        head = json.dumps(report, indent=1)[:-2]
        rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in self.rows)
        self.json.parent.mkdir(parents=True, exist_ok=True)
        _write(self.json, f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')
        _write(self.markdown, as_markdown(self.rows))
        self.saved, self.unsaved = time.monotonic(), False


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


Group = tuple[Config, list[Row]]


def group_rows(rows: Iterable[Row]) -> dict[tuple[str, str], list[Group]]:
    """Rows by problem and classifier, and there by configuration: one row a seed."""
    groups: dict[tuple[str, str], dict[Config, list[Row]]] = {}
    for row in rows:
        config = Config(**{name: row[name] for name in Config.__dataclass_fields__})
        groups.setdefault((row["problem"], row["classifier"]), {}).setdefault(config, []).append(row)
    return {key: list(configs.items()) for key, configs in groups.items()}


def choose(groups: Iterable[Group]) -> list[Group]:
    """For each rule, init, clamp and number of epochs, the gamma and learning rate with the best mean over validation images.

    Only among those that were trained on the most seeds without diverging; of equal ones the larger gamma, which changes the
    least, then the smaller learning rate.
    """
    kinds: dict[tuple[object, ...], list[Group]] = {}
    for config, rows in groups:
        kinds.setdefault((config.rule, config.init, config.projected_gradient, config.epochs), []).append((config, rows))

    def quality(group: Group) -> tuple[float, ...]:
        config, rows = group
        return (
            sum(not row["diverged"] for row in rows),
            statistics.fmean(row["val_all_selected"] or 0.0 for row in rows),
            config.gamma or 0.0,
            -config.lr,
        )

    return [max(candidates, key=quality) for candidates in kinds.values()]


def _gain(rows: Sequence[Row], split: str, state: str) -> str:
    """Mean and standard deviation over the seeds, in points."""
    pairs = [(row[f"test_{split}_{state}"], row[f"test_{split}_before"]) for row in rows]
    gains = [100 * (after - before) for after, before in pairs if after is not None and before is not None]
    if len(gains) < len(rows):
        return "diverged"
    return f"{statistics.fmean(gains):+.1f}" + (f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else "")


def _mean(rows: Sequence[Row], name: str, digits: int = 1) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{statistics.fmean(values):.{digits}f}" if values else "-"


def _table(groups: Iterable[Group]) -> list[str]:
    names = ["rule", "init", "projected", "gamma", "lr", "epochs", "few", "all", "few, last", "all, last"]
    names += ["epoch", "clamped", "clamped, last", "seeds"]
    lines = ["| " + " | ".join(names) + " |", "|---|---|---|" + "---:|" * (len(names) - 3)]
    for config, rows in groups:
        gamma = "" if config.gamma is None else f"{config.gamma:g}"
        projected = "" if config.gamma is None else "yes" if config.projected_gradient else "no"
        cells = [config.rule, config.init, projected, gamma, f"{config.lr:g}", str(config.epochs)]
        cells += [_gain(rows, split, state) for state in ("selected", "last") for split in ("few", "all")]
        cells += [_mean(rows, name) for name in ("selected_epoch", "clamped_selected", "clamped_last")]
        lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return lines


def as_markdown(rows: Sequence[Row]) -> str:
    """For each problem and classifier: what validation would choose, and every configuration."""
    lines = [
        "# Which options should be the defaults",
        "",
        "Gains in top-1 accuracy on test images, in points, over the classifier that the head was made from: mean and",
        f"standard deviation over the seeds. {TOP_K} neighbours. The epoch is selected by the accuracy over all validation",
        "images, epoch 0 (before training) included; the columns called last are of the last epoch. Clamped is the number of",
        "few classes whose own coefficient is on its clamp: there they stay, unless the gradient is projected.",
    ]
    for (problem, classifier), groups in group_rows(rows).items():
        here = [row for _, of_config in groups for row in of_config]
        by_seed = list({row["seed"]: row for row in here}.values())
        before = ", ".join(f"{split} {100 * value:.1f}%" for split, value in _before(by_seed).items())
        lines += ["", f"## {problem}, made from the {classifier} classifier", ""]
        lines.append(f"Before, mean over {len(by_seed)} seeds: {before}; {by_seed[0]['num_few']} few classes.")
        if problem == "quickdraw":
            lines.append(ATTRIBUTION)
        lines += ["", "With the gamma and learning rate that validation images choose:", "", *_table(choose(groups))]
        lines += ["", "All:", "", *_table(groups)]
    return "\n".join(lines) + "\n"


def _before(rows: Sequence[Row]) -> dict[str, float]:
    values = {split: [row[f"test_{split}_before"] for row in rows] for split in SPLITS}
    return {split: statistics.fmean(numbers) for split, numbers in values.items() if None not in numbers}


def problems(names: Sequence[str], seeds: Sequence[int], cache: Path) -> Iterator[Problem]:
    for name, seed in itertools.product(names, seeds):
        yield digits_problem(seed) if name == "digits" else load_problem(problem_path(cache, seed))


def run(
    results: Results,
    names: Sequence[str],
    classifiers: Sequence[str],
    seeds: Sequence[int],
    grid: Sequence[Config],
    cache: Path,
) -> None:
    """Train all that is missing of the results, and save them: also when interrupted."""
    try:
        with progress_bar(Console(stderr=True)) as bar:
            task = bar.add_task("trainings", total=len(names) * len(classifiers) * len(seeds) * len(grid))
            for problem in problems(names, seeds, cache):
                done = results.done(problem)
                for classifier in classifiers:
                    configs = [c for c in grid if results.key(problem.name, classifier, problem.seed, c) not in done]
                    bar.update(task, total=(bar.tasks[0].total or 0) - (len(grid) - len(configs)))
                    bar.update(task, description=f"{problem.name} {problem.seed}, {classifier}")
                    for config, trained in train_all(problem, classifier, configs):
                        results.add(make_row(problem, classifier, config, trained))
                        bar.advance(task)
    finally:
        results.save()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare rules, inits, clamps, gammas and learning rates.")
    parser.add_argument("--output", type=Path, required=True, help="the files to write or to add to, without .json and .md")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of bench/quickdraw.py (default: %(default)s)")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--classifiers", nargs="+", choices=CLASSIFIERS, default=list(CLASSIFIERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=["clamp", "softmax", "l1"])
    parser.add_argument("--inits", nargs="+", default=["identity", "default"])
    parser.add_argument("--projected", nargs="+", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--gammas", nargs="+", type=float, default=[0.3, 0.5, 0.7, 0.9, 1.0])
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.01, 0.03, 0.1, 0.3])
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1, for the products are small)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    projected = [choice == "yes" for choice in options.projected]
    grid = make_grid(options.rules, options.inits, projected, options.gammas, options.lrs, options.epochs)
    seeds = list(dict.fromkeys(options.seeds))
    try:
        results = Results(options.output)
        run(results, options.problems, options.classifiers, seeds, grid, options.cache)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; what was done is kept, and the same command goes on from there")
        return 130
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"defaults: {error}", markup=False, soft_wrap=True)
        return 1
    Console().print(f"{results.json}, {results.markdown}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
