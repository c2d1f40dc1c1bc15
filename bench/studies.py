"""The paper's study on data that fit here, and what lies above one constant on the few logits, on other draws of the data.

    python bench/studies.py complete --results NAME [--seed 5] [--seeds 3]
    python bench/studies.py problems --results NAME [--seed 3 4 5 6 7]

``complete`` runs every experiment of ``alphaext study`` on the digits and on QuickDraw-345 (the features of
``bench/quickdraw.py``) with the plain form, for the jointly trained classifier and for cRT, and writes for each data set
``bench/results/NAME/DATA/``: the tables ``CLASSIFIER/*.csv`` and ``results.json``, and ``report.html`` with ``tables.md``.

``problems`` runs the experiments "compare" and "beyond" alone, on several draws of rare classes, images and network, for the
jointly trained classifier, cRT and LWS, and writes ``bench/results/NAME.json`` and ``NAME.md``: accuracies, and differences
over all, draw by draw, with the 95% interval of Student's t: to the best that one constant on the few logits does, and to
preset few.

QuickDraw's drawings have at most 80 training images a class: "many" are here the classes with more than 40.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from intervals import t_interval
from machine import describe
from quickdraw import ATTRIBUTION, Problem, default_cache, digits_problem, load_problem, problem_path
from rich.console import Console
from torch import nn

from alphaext import split_classes
from alphaext.baselines import run_baseline
from alphaext.features import write_features
from alphaext.study.plans import StudyOptions
from alphaext.study.report.front import Front
from alphaext.study.report.write import write_report
from alphaext.study.rows import FRONT, read_rows
from alphaext.study.run import CLASSES, CONFUSIONS, RESULTS, ROWS, run_study

ROOT = Path(__file__).parent / "results"
MANY_ABOVE = {"quickdraw": 40, "digits": 100}
PARTS = ("train", "val", "test")
KEPT = (
    *("experiment", "method", "seed", "metric", "gamma", "tau", "offset", "lr", "epoch", "seconds", "error"),
    *(f"{part}_{name}" for part in ("val", "test") for name in ("few", "medium", "many", "all")),
)


def classifier_of(problem: Problem, name: str) -> nn.Linear:
    """The classifier of a problem by its name; LWS is trained on the joint one's features."""
    if name in problem.classifiers:
        return problem.classifiers[name]
    made = run_baseline(
        name,
        problem.features["train"],
        problem.labels["train"],
        linear=problem.classifiers["joint"],
        val_features=problem.features["val"],
        val_labels=problem.labels["val"],
        split=split_classes(problem.counts, many_above=MANY_ABOVE[problem.name]),
        epochs=15,
        batch_size=64,
        lr=0.2,
        seed=problem.seed,
        progress=False,
    )
    return made.linear


def study(problem: Problem, classifier: str, folder: Path, options: StudyOptions) -> dict[str, Any]:
    """A study of a problem's classifier, into ``folder``."""
    with tempfile.TemporaryDirectory() as temporary:
        for part in PARTS:
            write_features(
                Path(temporary) / part,
                problem.features[part],
                problem.labels[part],
                num_classes=len(problem.class_names),
                class_names=problem.class_names,
            )
        results = run_study(
            temporary,
            classifier_of(problem, classifier),
            folder,
            options,
            classifier_name=f"{problem.name}, {classifier}",
            many_above=MANY_ABOVE[problem.name],
            attribution=ATTRIBUTION if problem.name == "quickdraw" else None,
        )
    results["features"] = f"{problem.name}, seed {problem.seed}"  # they were in a temporary folder
    (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    return results


def complete(name: str, seed: int, seeds: int, cache: Path, console: Console) -> None:
    started = time.monotonic()
    for problem in (digits_problem(seed), load_problem(problem_path(cache, seed))):
        folder = ROOT / name / problem.name
        for classifier in ("joint", "crt"):
            begun = time.monotonic()
            with tempfile.TemporaryDirectory() as temporary:
                study(problem, classifier, Path(temporary) / "study", StudyOptions(seeds=seeds, forms=["plain"]))
                (folder / classifier).mkdir(parents=True, exist_ok=True)
                for file in (ROWS, RESULTS, CLASSES, CONFUSIONS):
                    shutil.copyfile(Path(temporary) / "study" / file, folder / classifier / file)
            console.print(f"{problem.name}, {classifier}: {time.monotonic() - begun:.0f} s")
        with tempfile.TemporaryDirectory() as temporary:
            report = Path(temporary) / "report"
            write_report([folder / classifier for classifier in ("joint", "crt")], report, title=f"Alpha Net on {problem.name}")
            for file in ("report.html", "tables.md"):
                shutil.copyfile(report / file, folder / file)
    console.print(f"all: {time.monotonic() - started:.0f} s, {torch.get_num_threads()} threads; {ROOT / name}")


def problems(name: str, seeds: Sequence[int], cache: Path, console: Console) -> None:
    rows = []
    for seed in seeds:
        problem = load_problem(problem_path(cache, seed))
        for classifier in ("joint", "crt", "lws"):
            begun = time.monotonic()
            options = StudyOptions(experiments=["beyond", "compare"], seeds=1, first_seed=seed)
            with tempfile.TemporaryDirectory() as temporary:
                study(problem, classifier, Path(temporary) / "study", options)
                for row in read_rows(Path(temporary) / "study" / ROWS):
                    if row["experiment"] in ("beyond", "compare", FRONT):
                        kept = {key: row[key] for key in KEPT if row[key] is not None}
                        rows.append(kept | {"problem": seed, "classifier": classifier})
            console.print(f"seed {seed}, {classifier}: {time.monotonic() - begun:.0f} s")
    machine = describe()
    result = {"attribution": ATTRIBUTION, "machine": machine, "many_above": MANY_ABOVE["quickdraw"], "rows": rows}
    # A row a line.
    text = json.dumps(result | {"rows": "ROWS"}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    (ROOT / f"{name}.json").write_text(text.replace('"ROWS"', f"[\n  {lines}\n ]") + "\n")
    (ROOT / f"{name}.md").write_text(markdown(rows, seeds))
    console.print(f"{ROOT / name}.md")


def markdown(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The table of several draws."""
    lines = [
        f"# Alpha Nets and rivals on QuickDraw-345, draws {', '.join(map(str, seeds))}",
        "",
        f"Top-1 on test images, %, means over {len(seeds)} draws of rare classes, images and network, with deviations. "
        "The last columns are accuracy over all less that of *few-bias*, the best that one constant on the few logits does, in "
        "points, with the 95% interval of Student's t over the draws; and less what a constant with equal few accuracy "
        "comes to (the front), where there is one: of the others no constant has so much few accuracy. Everything is chosen on "
        "validation images, but the front's constants. "
        f"{ATTRIBUTION}",
        "",
        "| classifier | method | few | medium | many | all | all less few-bias | above the front |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    fronts = {key: front_of(rows, *key) for key in dict.fromkeys((row["classifier"], row["problem"]) for row in rows)}
    beyond = [row for row in rows if row["experiment"] == "beyond"]
    rows = [row for row in rows if row["experiment"] == "compare"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for classifier in dict.fromkeys(row["classifier"] for row in rows):
        of = {method: [row for row in rows if (row["classifier"], row["method"]) == (classifier, method)] for method in methods}
        for method, own in of.items():
            cells = [_mean([row.get(f"test_{part}") for row in own]) for part in ("few", "medium", "many", "all")]
            differences = [
                100 * (row["test_all"] - other["test_all"])
                for row, other in zip(own, of["few-bias"], strict=True)
                if "test_all" in row and "test_all" in other
            ]
            heights = [
                100 * (row["test_all"] - below)
                for row in own
                if "test_all" in row and (below := fronts[classifier, row["problem"]].all_at(row["test_few"])) is not None
            ]
            more = f"; {len(own) - len(heights)} beyond" if len(heights) < len(own) else ""
            lines.append(
                f"| {classifier} | {method} | {' | '.join(cells)} | {interval(differences)} | {interval(heights)}{more} |"
            )
    return "\n".join(lines + (_beyond(beyond) if beyond else [])) + "\n"


def _beyond(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of what is beyond the paper, alone and left out."""
    lines = [
        "",
        "## Each means alone, all together, and all but one",
        "",
        "Differences to preset few, draw by draw, in points, with the same intervals.",
        "",
        "| classifier | method | few | all | few less preset few's | all less preset few's |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for classifier in dict.fromkeys(row["classifier"] for row in rows):
        of: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["classifier"] == classifier:
                of.setdefault(row["method"], []).append(row)
        for method, own in of.items():
            cells = [_mean([row.get(f"test_{part}") for row in own]) for part in ("few", "all")]
            for part in ("few", "all"):
                pairs = zip(own, of["Alpha Net, preset few"], strict=True)
                key = f"test_{part}"
                cells.append(interval([100 * (row[key] - best[key]) for row, best in pairs if key in row and key in best]))
            lines.append(f"| {classifier} | {method} | {' | '.join(cells)} |")
    return lines


def front_of(rows: Sequence[dict[str, Any]], classifier: str, problem: int) -> Front:
    """What constants on the few logits come to on test images, the original and the chosen one among them."""
    best: dict[float, float] = {}
    for row in rows:
        if (row["classifier"], row["problem"]) == (classifier, problem) and row["method"] in ("original", "few-bias"):
            best[row["test_few"]] = max(row["test_all"], best.get(row["test_few"], 0.0))
    few = sorted(best)
    return Front(tuple(few), tuple(best[value] for value in few), len(few))


def _mean(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ±{statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.1f}{spread}"


def interval(differences: Sequence[float]) -> str:
    """A mean and its 95% interval."""
    if not differences:
        return "-"
    mean, low, high = t_interval(differences)
    if len(differences) < 2 or not any(differences):
        return f"{mean:+.2f}"
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Studies on digits and QuickDraw-345.")
    parser.add_argument("what", choices=("complete", "problems"))
    parser.add_argument("--results", required=True, help="the name of the results")
    parser.add_argument("--seed", type=int, nargs="+", help="of the data: one for complete (5), some for problems (3 to 7)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each configuration, of complete")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="the features of bench/quickdraw.py")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    seeds = options.seed or ([5] if options.what == "complete" else [3, 4, 5, 6, 7])
    missing = [seed for seed in seeds if not problem_path(options.cache, seed).exists()]
    if missing:
        print(f"no features of seed {missing[0]}: python bench/quickdraw.py --seeds {missing[0]}", file=sys.stderr)
        return 2
    ROOT.mkdir(exist_ok=True)
    if options.what == "complete":
        complete(options.results, seeds[0], options.seeds, options.cache, console)
    else:
        problems(options.results, seeds, options.cache, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
