"""The comparison of a study: the rivals and the Alpha Net, each with what validation samples choose for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..baselines.nearest_mean import ncm
from ..baselines.registry import run_baseline
from ..metrics.class_table import class_table, write_class_table
from ..metrics.confusions import confusion_changes, write_confusions
from ..metrics.predictions import predict
from ..training.few_bias import choose_few_bias, few_bias
from ..training.selection import BaselineResult
from ..utils.files import without_nan
from .plans import CANDIDATES, FORM_NAMES, RETRAINED, Trial, choose
from .rows import FRONT, Row, chosen_columns, row_key
from .trials import Problem, Trainings

_FRONT_POINTS = 21
_CANDIDATES_OF = {"tau": "taus", "logit-adjustment": "taus", "few-bias": "offsets"}
"""The rivals that one number makes, and the option that lists what it is chosen from."""

_NCM: dict[str, dict[str, Any]] = {
    "cosine": {},
    "euclidean": {"metric": "euclidean"},
    "cosine, centred": {"center": True, "normalize": True},
}


class Rivals:
    """The experiment "compare": the rivals beside the Alpha Nets, each with what validation chooses for it.

    Args:
        problem: with its original classifier measured.
        trainings: which have run.
    """

    def __init__(self, problem: Problem, trainings: Trainings) -> None:
        self.problem, self.trainings, self.options = problem, trainings, problem.options
        self.earlier = {key: row for key, row in problem.file.rows.items() if row["experiment"] == "compare"}
        self.choices: list[dict[str, Any]] = []

    def run(self, classes: Path, confusions: Path) -> list[dict[str, Any]]:
        """Add the rows of "compare", and of the candidates that are not trained, to the results.

        Args:
            classes: the table of what became of each class under the chosen Alpha Net of the first seed; written if it is not
                there or another head was chosen.
            confusions: the same of the confusions that it mends and makes.

        Returns:
            A dictionary for each choice: ``method``, ``seed``, ``policy``, ``max_drop``, ``chosen_on``, ``chosen``,
            ``candidates`` (how many there were), ``table`` (their validation accuracies).
        """
        # What an earlier run chose is chosen again, not measured again.
        problem, options = self.problem, self.options
        problem.file.remove("compare")
        problem.file.add({**problem.original, "experiment": "compare"})
        train = problem.parts["train"]
        with problem.measuring(len(_NCM) + len(_CANDIDATES_OF) + _FRONT_POINTS) as advance:
            make = partial(ncm, train.features, train.labels, train.num_classes)
            means = [self._candidate("ncm", partial(make, **how), advance, metric=metric) for metric, how in _NCM.items()]
            self._choose("ncm", means, None)
            for method in _CANDIDATES_OF:
                self._add_rival(method)
                advance()
            self._add_front(advance)
        for method, seed in itertools.product(RETRAINED if options.retraining_epochs else (), options.seed_values()):
            with problem.measuring(len(options.retraining_lrs)) as advance:
                own = {"epochs": options.retraining_epochs, "seed": seed}
                retrain = partial(self._baseline, method, progress=False, **own)
                found = [
                    self._candidate(method, partial(retrain, lr=lr), advance, lr=lr, **own)
                    for lr in sorted(options.retraining_lrs)
                ]
            self._choose(method, found, seed)
        for form, seed in itertools.product(FORM_NAMES, options.seed_values()):
            trials = self.trainings.candidates(form, seed)
            chosen = self._choose(FORM_NAMES[form], [problem.found(self.trainings.row(trial)) for trial in trials], seed)
            if chosen is not None and (form, seed) == (options.forms[0], options.first_seed):
                self._write_classes(trials[chosen], classes, confusions)
        for row in self.earlier.values():
            if row["seed"] not in (None, *options.seed_values()):
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
        add({**chosen, "experiment": "compare", **policy})
        names = [name for name in chosen_columns(method) if chosen[name] is not None]
        table = [{name: row[name] for name in (*names, "val_few", "val_all", "error")} for row in rows]
        self._note(method, seed, {name: chosen[name] for name in names}, table, len(rows))
        return next(number for number, row in enumerate(rows) if row is chosen)

    def _note(
        self, method: str, seed: int | None, chosen: dict[str, Any], table: Sequence[Mapping[str, Any]], candidates: int
    ) -> None:
        self.choices.append(
            {
                "method": method,
                "seed": seed,
                "policy": self.options.policy,
                "max_drop": self.options.max_drop,
                "chosen_on": "val",
                "chosen": chosen,
                "candidates": candidates,
                "table": list(table),
            }
        )

    def _candidate(
        self, method: str, make: Callable[[], nn.Linear | BaselineResult], advance: Callable[[], None], **values: Any
    ) -> Row:
        """The row of a rival with these values, or of why there is none; measured unless the results have it."""
        row = self.problem.found(self.problem.row(CANDIDATES, method, **values))
        if row["val_all"] is None and row["error"] is None:
            started = time.monotonic()
            try:
                made = make()
            except (ValueError, FloatingPointError) as error:
                row = row | {"error": str(error)}
            else:
                seconds = time.monotonic() - started
                linear, epoch = (made.linear, made.chosen["epoch"]) if isinstance(made, BaselineResult) else (made, None)
                linear = linear.to(self.problem.linear.weight.device)
                row = row | {"seconds": seconds, "epoch": epoch} | self.problem.measured(linear)
            self.problem.file.add(row)
        advance()
        return row

    def _baseline(self, method: str, **options: Any) -> BaselineResult:
        """A rival that starts from the original classifier, with what its options leave open chosen on validation samples."""
        problem, train, val = self.problem, self.problem.parts["train"], self.problem.parts["val"]
        return run_baseline(
            method,
            train.features,
            train.labels,
            linear=problem.linear,
            val_features=val.features,
            val_labels=val.labels,
            split=problem.split,
            **problem.selection(),
            **options,
        )

    def _add_rival(self, method: str) -> None:
        """Add a rival with the one number that validation chooses for it."""
        started, problem = time.monotonic(), self.problem
        row = problem.row("compare", method, policy=self.options.policy, chosen_on="val")
        try:
            found = self._baseline(method)
        except ValueError as error:  # a classifier that has a row of zeros, for example
            problem.file.add(row | {"error": str(error)})
            return
        ((name, value),) = found.chosen.items()
        linear = found.linear
        table = [{name: entry[name], "val_few": entry["few"], "val_all": entry["all"]} for entry in found.table]
        if self.options.policy == "knee":
            value = choose(sorted(table, key=lambda entry: abs(entry[name])), "knee")[name]
            linear = self._baseline(method, **{_CANDIDATES_OF[method]: [value]}).linear
        row = row | {name: value}
        known = self.earlier.get(row_key(row))
        if known is None or known["val_all"] is None:
            known = row | {"seconds": time.monotonic() - started} | problem.measured(linear)
        problem.file.add(known)
        candidates = found.settings.get("candidates", len(table))
        self._note(method, None, {name: value}, [without_nan(entry) for entry in table], candidates)

    def _add_front(self, advance: Callable[[], None]) -> None:
        """Add what few and all come to with each constant on the few logits; where the constants lie, validation says."""
        problem, val = self.problem, self.problem.parts["val"]
        try:
            table = choose_few_bias(problem.linear, val.features, val.labels, problem.split).table
        except ValueError:  # validation samples that show too little; the rival's own row says so
            return
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
            class_means=problem.class_means,
        )
        write_class_table(rows, classes, overwrite=True)
        changes = confusion_changes(before, after, problem.split, class_names=train.class_names)
        write_confusions(changes, confusions, overwrite=True)
