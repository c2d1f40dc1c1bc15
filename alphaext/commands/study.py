"""``alphaext study``: every experiment of the paper on cached features, with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

import alphaext

from ..study.plans import EXPERIMENTS, FORMS, POLICIES, StudyOptions
from ..utils.text import percent
from . import results
from .options import option
from .shared import CheckpointOptions, CommonOptions, FeaturesOptions, SplitOptions

_DEFAULTS = StudyOptions()
_OF_THE_STUDY = (
    *("experiments", "seeds", "gammas", "fixed_gammas", "top_ks", "few_samples", "negative_ratios", "forms"),
    *("sharing_lr", "retraining_epochs", "retraining_lrs"),
    *("top_k", "epochs", "batch_size", "lr", "pca_dim", "policy", "max_drop"),
)


@dataclass(frozen=True, kw_only=True)
class Study(CommonOptions, FeaturesOptions, SplitOptions, CheckpointOptions):
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
    classifier: Path | None = option(
        None,
        help="the trained classifier: a checkpoint of any layout, or a folder that a command wrote; without, --checkpoint",
    )
    output: Path = option(metavar="FOLDER", help="where results go")
    overwrite: bool = option(False, help="start anew where there are results")
    experiments: tuple[str, ...] = option(
        tuple(EXPERIMENTS),
        choices=tuple(EXPERIMENTS),
        help="which; " + "; ".join(": ".join(each) for each in EXPERIMENTS.items()),
    )
    seeds: int = option(_DEFAULTS.seeds, help="trainings of each configuration, from --seed on")
    gammas: tuple[float, ...] = option(_DEFAULTS.gammas, help="of gamma, pool, sharing and compare")
    fixed_gammas: tuple[float, ...] = option(_DEFAULTS.fixed_gammas, help="of experiments that vary something else")
    top_ks: tuple[int, ...] = option(_DEFAULTS.top_ks, help="neighbours, of top-k")
    few_samples: tuple[int, ...] = option(_DEFAULTS.few_samples, help="images that few classes keep at most, of data-size")
    negative_ratios: tuple[float, ...] = option(
        _DEFAULTS.negative_ratios, help="base samples for each few sample, of negatives"
    )
    forms: tuple[str, ...] = option(
        _DEFAULTS.forms,
        choices=tuple(FORMS),
        help="of Alpha Net in gamma, top-k, pool, sharing, negatives and data-size; of the first compare shows the classes",
    )
    sharing_lr: float = option(_DEFAULTS.sharing_lr, help="learning rate of a shared sub-module, of sharing")
    retraining_epochs: int = option(_DEFAULTS.retraining_epochs, help="of cRT and LWS in compare; 0 leaves them out")
    retraining_lrs: tuple[float, ...] = option(_DEFAULTS.retraining_lrs, help="learning rates of cRT and LWS to choose from")
    top_k: int = option(_DEFAULTS.top_k, help="neighbours of each few class, of all but top-k")
    epochs: int = option(_DEFAULTS.epochs, help="of training")
    batch_size: int = option(_DEFAULTS.batch_size, help="samples a step")
    lr: float = option(_DEFAULTS.lr, help="learning rate")
    pca_dim: int | None = option(
        _DEFAULTS.pca_dim, help="width to which classifiers are reduced for the sub-modules; the paper: 500, Places-LT 300"
    )
    policy: str = option(
        _DEFAULTS.policy,
        choices=POLICIES,
        help="what choices on validation features go by: accuracy over all, accuracy of few, or the knee between both",
    )
    max_drop: float | None = option(None, metavar="POINTS", help="under best_few: what accuracy over all may lose; without, 0")
    jobs: int | None = option(None, help="trainings at a time; without, one a core")
    attribution: str | None = option(None, help="a text for results.json, such as the data set's licence")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Run what is not there yet, print, write; returns what results.json holds."""
        console = results.console_or_quiet(console)
        options = StudyOptions(first_seed=self.seed, **{name: getattr(self, name) for name in _OF_THE_STUDY})
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
    table = Table(title=f"{experiment}: {EXPERIMENTS[experiment]}", caption="top-1 accuracy on test features, %; ± over seeds")
    names = list(dict.fromkeys(name for entry in entries for name in entry["configuration"]))
    for name in ("method", *names):
        table.add_column(name)
    for name in ("few", "gain", "all", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        cells = [_shown(entry["configuration"].get(name)) for name in names]
        for name in ("few", "all"):
            deviation = entry[f"{name}_std"]
            cells.append(percent(entry[name]) + (f" ±{percent(deviation)}" if deviation is not None else ""))
            cells.append(percent(entry[f"{name}_gain"], sign=True))
        table.add_row(Text(entry["method"]), *map(Text, cells))
        if entry["errors"]:
            table.add_row(Text(f"  {entry['errors']} of {entry['seeds']} not trained: see the column error"), style="red")
    return table


def _shown(value: object) -> str:
    words = {None: "", True: "yes", False: "no"}
    if value is None or isinstance(value, bool):
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
