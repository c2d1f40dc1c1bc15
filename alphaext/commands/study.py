"""``alphaext study``: every experiment of the paper on cached features, with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import alphaext

from ..study.plans import EXPERIMENTS, StudyOptions
from ..utils.text import percent, value_text
from . import results
from .options import from_table, option
from .shared import ClassifierOptions, CommonOptions, FeaturesOptions, FewClassesOptions, OutputOptions

_TABLE = [entry for entry in fields(StudyOptions) if entry.metadata["help"]]


@dataclass(frozen=True, kw_only=True)
@from_table(_TABLE)
class Study(CommonOptions, FeaturesOptions, FewClassesOptions, OutputOptions, ClassifierOptions):
    """Run the paper's experiments on a classifier, each with several seeds, into one table.

    Gamma, neighbours, their pool, weight sharing, negative samples, rule, start, controls, fewer samples, and the comparison
    with cheap rivals, each with what validation features choose for it. Writes results.csv (a row for each head or rival and
    seed), results.json and, with compare, classes.csv. Run again, it goes on where it stopped; asked for more experiments or
    seeds, it adds them.

    Example:
        alphaext study --features features --classifier crt --experiments gamma compare --output study
    """

    section: ClassVar[str] = "study"
    goes_on: ClassVar[bool] = True
    overwrite: bool = option(False, help="start anew where there are results")
    jobs: int | None = option(None, help="trainings at a time; without, one a core")
    attribution: str | None = option(None, help="a text for results.json, such as the data set's licence")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Run what is not there yet, print, write; returns what results.json holds."""
        console = results.console_or_quiet(console)
        options = StudyOptions(first_seed=self.seed, **{entry.name: getattr(self, entry.name) for entry in _TABLE})
        train, val = self.read("train", "val")
        linear, path = self.classifier_or_checkpoint(self.classifier, train.num_classes)
        results.warn_of_other_features(linear, val, str(path))
        found = alphaext.study.run_study(
            self.features,
            linear.to(self.chosen_device()),
            self.output,
            options,
            classifier_name=results.classifier_name(path),
            few_below=self.few_below,
            many_above=self.many_above,
            few_classes=self.named_classes(val.num_classes, val.class_names),
            jobs=self.jobs,
            overwrite=self.overwrite,
            attribution=self.attribution,
            progress=self.progress,
        )
        for experiment in options.experiments:
            entries = [entry for entry in found["summary"] if entry["experiment"] == experiment]
            console.print(_table(experiment, entries))
        console.print(f"Results: {self.output / alphaext.study.run.ROWS}", markup=False, highlight=False, soft_wrap=True)
        return found


def _table(experiment: str, entries: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for entry in entries for name in entry["configuration"]))
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("few", "gain", "all", "gain"))
    title, caption = f"{experiment}: {EXPERIMENTS[experiment]}", "top-1 accuracy on test features, %; ± over seeds"
    table = Table("method", *names, *numbers, title=title, caption=caption)
    for entry in entries:
        values = (entry["configuration"].get(name) for name in names)
        cells = ["" if value is None else value_text(value) for value in values]
        for name in ("few", "all"):
            deviation = entry[f"{name}_std"]
            cells.append(percent(entry[name]) + (f" ±{percent(deviation)}" if deviation is not None else ""))
            cells.append(percent(entry[f"{name}_gain"], sign=True))
        table.add_row(Text(entry["method"]), *map(Text, cells))
        if entry["errors"]:
            table.add_row(Text(f"  {entry['errors']} of {entry['seeds']} not trained: see the column error"), style="red")
    return table
