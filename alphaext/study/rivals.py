"""The comparison of a study: the rivals and the Alpha Net, each with what validation samples choose for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..baselines.nearest_mean import ncm
from ..baselines.post_hoc import choose_logit_adjustment, choose_tau, logit_adjusted, tau_normalized
from ..baselines.registry import run_baseline
from ..features.store import Features
from ..metrics.class_table import class_table, write_class_table
from ..metrics.confusions import confusion_changes, write_confusions
from ..metrics.predictions import predict
from ..training.few_bias import choose_few_bias, few_bias
from ..training.selection import BaselineResult
from .plans import CANDIDATES, METHODS, RETRAINED, Trial, choose
from .rows import FRONT, Row, row_key, without_nan
from .trials import Problem, Trainings

__all__ = ["compare_rivals"]

_FRONT_POINTS = 21
_NCM: dict[str, dict[str, Any]] = {
    "cosine": {},
    "euclidean": {"metric": "euclidean"},
    "cosine, centred": {"center": True, "normalize": True},
}


def compare_rivals(problem: Problem, trainings: Trainings, classes: Path, confusions: Path) -> list[dict[str, Any]]:
    """Add the rows of "compare", and of the candidates that are not trained, to the results.

    Args:
        problem: with its original classifier measured.
        trainings: which have run.
        classes: the table of what became of each class under the chosen Alpha Net of the first seed; written if it is not there
            or another head was chosen.
        confusions: the same of the confusions that it mends and makes.

    Returns:
        A dictionary for each choice: ``method``, ``seed``, ``policy``, ``max_drop``, ``chosen_on``, ``chosen``, ``candidates``
        (how many there were), ``table`` (their validation accuracies).
    """
    return _Comparison(problem, trainings).run(classes, confusions)


class _Comparison:
    def __init__(self, problem: Problem, trainings: Trainings) -> None:
        self.problem, self.trainings, self.options = problem, trainings, problem.options
        rows = problem.file.rows.items()
        self.earlier = {key: row for key, row in rows if row["experiment"] == "compare"}
        self.choices: list[dict[str, Any]] = []

    def run(self, classes: Path, confusions: Path) -> list[dict[str, Any]]:
        # What an earlier run chose is chosen again, not measured again.
        problem = self.problem
        problem.file.remove("compare")
        problem.file.add({**problem.original, "experiment": "compare"})
        with problem.measuring(len(_NCM) + 3 + _FRONT_POINTS) as advance:
            self._choose("ncm", [self._ncm(variant, advance) for variant in _NCM], None)
            for method, choose_it in self._rivals():
                self._add_rival(method, choose_it)
                advance()
            self._add_front(advance)
        for method in RETRAINED if self.options.retraining_epochs else ():
            for seed in self.options.seed_values():
                self._choose(method, self._retrained(method, seed), seed)
        for form in METHODS:
            for seed in self.options.seed_values():
                trials = self.trainings.candidates(form, seed)
                chosen = self._choose(METHODS[form], [problem.found(self.trainings.row(trial)) for trial in trials], seed)
                if chosen is not None and form == "plain" and seed == self.options.first_seed:
                    self._write_classes(trials[chosen], classes, confusions)
        for row in self.earlier.values():
            if row["seed"] not in (None, *self.options.seed_values()):
                problem.file.add(row)
        return self.choices

    def _choose(self, method: str, rows: Sequence[Row], seed: int | None) -> int | None:
        """Make a row of "compare" of the chosen one of several results, and say which; None if all have failed."""
        policy, add = {"policy": self.options.policy, "chosen_on": "val"}, self.problem.file.add
        if all(row["val_all"] is None for row in rows):
            errors = "; ".join(dict.fromkeys(str(row["error"]) for row in rows))
            add(self.problem.row("compare", method, seed=seed, **policy, error=errors))
            return None
        chosen = choose(rows, self.options.policy, self.options.max_drop, original=self.problem.original)
        number = next(number for number, row in enumerate(rows) if row is chosen)
        add({**chosen, "experiment": "compare", **policy})
        names = ("gamma", "metric") if method in METHODS.values() else ("lr",) if method in RETRAINED else ("metric",)
        table = [{name: row[name] for name in (*names, "val_few", "val_all", "error")} for row in rows]
        self._note(method, seed, {name: chosen[name] for name in names}, table, len(rows))
        return number

    def _note(
        self, method: str, seed: int | None, chosen: dict[str, Any], table: Sequence[Mapping[str, Any]], candidates: int
    ) -> None:
        policy = {"policy": self.options.policy, "max_drop": self.options.max_drop, "chosen_on": "val"}
        of = {"chosen": chosen, "candidates": candidates, "table": list(table)}
        self.choices.append({"method": method, "seed": seed, **policy, **of})

    def _ncm(self, variant: str, advance: Callable[[], None]) -> Row:
        """The row of a nearest class mean classifier, or of why there is none of these features."""
        row = self.problem.found(self.problem.row(CANDIDATES, "ncm", metric=variant))
        if row["val_all"] is None:
            started, train = time.monotonic(), self.problem.parts["train"]
            try:
                made = ncm(train.features, train.labels, train.num_classes, **_NCM[variant])
            except ValueError as error:
                row = row | {"error": str(error)}
            else:
                seconds = time.monotonic() - started
                row = row | {"seconds": seconds} | self.problem.measured(made.to(self.problem.linear.weight.device))
            self.problem.file.add(row)
        advance()
        return row

    def _retrained(self, method: str, seed: int) -> list[Row]:
        """The rows of cRT or LWS, one for each learning rate, the smallest first."""
        problem, options = self.problem, self.options
        train, val = problem.parts["train"], problem.parts["val"]
        found = []
        with problem.measuring(len(options.retraining_lrs)) as advance:
            for lr in sorted(options.retraining_lrs):
                row = problem.row(CANDIDATES, method, seed=seed, lr=lr, epochs=options.retraining_epochs)
                row = problem.found(row)
                if row["val_all"] is None and row["error"] is None:
                    row = row | self._retrain(method, seed, lr, train, val)
                    problem.file.add(row)
                found.append(row)
                advance()
        return found

    def _retrain(self, method: str, seed: int, lr: float, train: Features, val: Features) -> dict[str, Any]:
        started, problem = time.monotonic(), self.problem
        try:
            made = run_baseline(
                method,
                train.features,
                train.labels,
                linear=problem.linear,
                val_features=val.features,
                val_labels=val.labels,
                split=problem.split,
                seed=seed,
                lr=lr,
                epochs=self.options.retraining_epochs,
                progress=False,
                **problem.selection(),
            )
        except (ValueError, FloatingPointError) as error:
            return {"error": str(error)}
        seconds = time.monotonic() - started
        epoch = made.chosen.get("epoch")
        return {"seconds": seconds, "epoch": epoch, **problem.measured(made.linear)}

    def _rivals(self) -> Iterator[tuple[str, Callable[[], BaselineResult]]]:
        problem = self.problem
        val, linear = problem.parts["val"], problem.linear
        counts = problem.parts["train"].class_counts()
        samples: dict[str, Any] = {"val_features": val.features, "val_labels": val.labels, "split": problem.split}
        options = samples | problem.selection()
        yield "tau", lambda: choose_tau(linear, **options)
        yield "logit-adjustment", lambda: choose_logit_adjustment(linear, counts, **options)
        yield "few-bias", lambda: choose_few_bias(linear, **options)

    def _add_rival(self, method: str, choose_it: Callable[[], BaselineResult]) -> None:
        """Add a rival with the one number that validation chooses for it."""
        started, problem = time.monotonic(), self.problem
        row = problem.row("compare", method, policy=self.options.policy, chosen_on="val")
        try:
            found = choose_it()
        except ValueError as error:  # a classifier that has a row of zeros, for example
            problem.file.add(row | {"error": str(error)})
            return
        (name, value), *_ = found.chosen.items()
        table = [{name: entry[name], "val_few": entry["few"], "val_all": entry["all"]} for entry in found.table]
        if self.options.policy == "knee":
            value = choose(sorted(table, key=lambda entry: abs(entry[name])), "knee")[name]
        row = row | {name: value}
        known = self.earlier.get(row_key(row))
        if known is None or known["val_all"] is None:
            known = row | {"seconds": time.monotonic() - started} | problem.measured(self._rival(method, value))
        problem.file.add(known)
        self._note(
            method, None, {name: value}, [without_nan(entry) for entry in table], found.settings.get("candidates", len(table))
        )

    def _rival(self, method: str, value: float) -> nn.Linear:
        linear = self.problem.linear
        if method == "tau":
            return tau_normalized(linear, value)
        if method == "logit-adjustment":
            return logit_adjusted(linear, self.problem.parts["train"].class_counts(), value)
        return few_bias(linear, self.problem.split.few, value)

    def _add_front(self, advance: Callable[[], None]) -> None:
        """Add what few and all come to with each constant on the few logits; where the constants lie, validation says."""
        problem, val = self.problem, self.problem.parts["val"]
        table = choose_few_bias(problem.linear, val.features, val.labels, problem.split).table
        places = np.linspace(0, len(table) - 1, min(len(table), _FRONT_POINTS)).round().astype(int).tolist()
        for place in dict.fromkeys(places):
            offset = table[place]["offset"]
            row = problem.found(problem.row(FRONT, "few-bias", offset=offset))
            if row["val_all"] is None:
                row = row | problem.measured(few_bias(problem.linear, problem.split.few, offset))
                problem.file.add(row)
            advance()

    def _write_classes(self, trial: Trial, classes: Path, confusions: Path) -> None:
        """Write what became of each class under the head that validation chose, if it is not there yet."""
        there = classes.exists() and confusions.exists()
        if there and row_key({**self.trainings.row(trial), "experiment": "compare"}) in self.earlier:
            return
        problem, head = self.problem, self.trainings.head(trial)
        train, test = problem.parts["train"], problem.parts["test"]
        before, after = (predict(each, test.features, test.labels, progress=False) for each in (problem.linear, head.fold()))
        rows = class_table(
            before,
            after,
            problem.split,
            train.class_counts(),
            class_names=train.class_names,
            head=head,
            class_means=problem.class_means(),
        )
        write_class_table(rows, classes, overwrite=True)
        changes = confusion_changes(before, after, problem.split, class_names=train.class_names)
        write_confusions(changes, confusions, overwrite=True)
