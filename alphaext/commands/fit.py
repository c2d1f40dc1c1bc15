"""``alphaext fit``: an Alpha Net on cached features, its gamma chosen on validation features."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._checks import check_gamma
from .._files import whole_file
from ..config import option
from ..modules import AlphaNet
from ..options import NEGATIVE_SAMPLINGS, SCHEDULES, SELECTIONS
from ..sweep import SweepRun, fit_many
from ..tables import percent
from ..training import selection_score
from . import shared
from .shared import CommonOptions, FeaturesOptions, LayerOptions, SplitOptions

_CHECKPOINTS = ".alphaext-fit"  # nobody else's
_OF_THE_HEAD = ("top_k", "pool", "metric", "pca_dim", "hidden_dim", "rule", "init", "shared", "projected_gradient", "seed")
_OF_THE_TRAINING = (
    *("epochs", "batch_size", "lr", "momentum", "weight_decay", "nesterov", "lr_schedule", "lr_step", "lr_factor"),
    *("lr_milestones", "negative_ratio", "negative_sampling", "select", "min_all"),
)


@dataclass(frozen=True, kw_only=True)
class Fit(CommonOptions, FeaturesOptions, SplitOptions, LayerOptions):
    """Rebuild the few rows of a classifier: train an Alpha Net on cached features and fold it.

    With several gammas each is trained, and validation features choose. Writes classifier.pth (a plain weight and bias),
    head.pt (the Alpha Net's state), result.json and run.json into the output folder.

    Example:
        alphaext fit --features features --classifier crt --gamma 0.5 0.7 0.9 1 --output alpha-crt
    """

    section: ClassVar[str] = "fit"
    classifier: Path = option(help="the trained classifier: a checkpoint of any known layout, or a folder that a command wrote")
    output: Path = option(metavar="FOLDER", help="where results go")
    overwrite: bool = option(False, help="replace results that are there")
    gamma: tuple[float, ...] = option((1.0,), help="the own coefficient's bound, in (0, 1]; of several, validation chooses")
    top_k: int = option(5, help="neighbours of each few class")
    pool: str = option("base", choices=("base", "many", "all"), help="classes that neighbours are chosen from")
    metric: str = option("euclidean", choices=("euclidean", "cosine", "random"), help="what makes a neighbour near")
    pca_dim: int | None = option(
        500, help="width to which classifiers are reduced for the sub-modules; the paper: 500, Places-LT 300"
    )
    hidden_dim: int | None = option(None, help="hidden units of a sub-module; without, as wide as a reduced classifier")
    rule: str = option("clamp", choices=("clamp", "softmax", "l1"), help="how a sub-module's outputs become coefficients")
    init: str = option("identity", choices=("identity", "default"), help="start at the original classifier, or PyTorch's start")
    shared: bool = option(False, help="one sub-module for all few classes")
    projected_gradient: bool = option(True, help="let a clamped coefficient return; the paper does not")
    epochs: int = option(80, help="of training")
    batch_size: int = option(64, help="samples a step")
    lr: float = option(0.1, help="learning rate")
    momentum: float = option(0.9, help="of SGD")
    weight_decay: float = option(0.0, help="L2 penalty")
    nesterov: bool = option(False, help="Nesterov momentum")
    lr_schedule: str = option("step", choices=SCHEDULES, help="how the learning rate falls")
    lr_step: int = option(20, help="epochs between falls, under step")
    lr_factor: float = option(0.1, help="what a fall multiplies by")
    lr_milestones: tuple[int, ...] | None = option(None, help="epochs of the falls, under multistep")
    negative_ratio: float = option(1.0, help="base samples for each few sample")
    negative_sampling: str = option("uniform", choices=NEGATIVE_SAMPLINGS, help="how base samples are drawn")
    select: str | None = option(
        None,
        choices=SELECTIONS,
        help="which epoch, and which gamma; without, best_all where there are validation features, else last",
    )
    min_all: float | None = option(None, help="under best_few: the least accuracy over all; without, the classifier's own")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Train, choose, write; returns what result.json holds."""
        console, started = shared.console_or_quiet(console), time.monotonic()
        if not self.gamma:
            raise ValueError("gamma must be given at least one value, got none")
        train, val = shared.read_train_and(self.features, "val", optional=True)
        if val is None and len(self.gamma) > 1:
            raise ValueError(
                f"gamma must be one value where there are no validation features to choose by, got {len(self.gamma)}; "
                f"there is no {str(self.features / 'val')!r}"
            )
        linear = shared.read_classifier(self.classifier, train.num_classes, self.classifier_layer)
        shared.warn_of_other_features(linear, train if val is None else val, str(self.classifier))
        linear = linear.to(shared.choose_device(self.device))
        for gamma in self.gamma:
            check_gamma(gamma)
        with shared.output_folder(self.output, shared.CLASSIFIER, shared.HEAD, overwrite=self.overwrite) as folder:
            if self.overwrite:
                shutil.rmtree(folder.path / _CHECKPOINTS, ignore_errors=True)
            runs = fit_many(
                linear,
                train.features,
                train.labels,
                self.configurations(),
                val_features=None if val is None else val.features,
                val_labels=None if val is None else val.labels,
                split=self.split(train),
                checkpoint=folder.path / _CHECKPOINTS,
                progress=self.progress,
            )
            for run in runs:
                if run.error and not run.error.startswith("training diverged"):
                    raise ValueError(f"gamma {run.config['gamma']:g}: {run.error}; --overwrite starts anew")
            run = runs[choose(runs, self.select, self.min_all)]
            assert run.head is not None and run.result is not None
            result = {
                "gamma": run.config["gamma"],
                "chosen_on": None if val is None else "val",
                "selection": run.result.selection,
                "epoch": run.result.selected_epoch,
                "engine": run.result.engine,
                "before": run.result.metrics_before,
                "after": run.result.metrics_after,
                "clamped": run.result.clamped,
                "candidates": [_candidate(entry) for entry in runs],
                "few_classes": run.head.few_classes.tolist(),
                "members": run.head.members.tolist(),
                "alphas": run.head.alphas().tolist(),
                "history": run.result.history,
            }
            folder.clear()
            _save(run.head, folder.path)
            shared.write_results(folder.path, "fit", self, result, started)
            shutil.rmtree(folder.path / _CHECKPOINTS, ignore_errors=True)
        _print(console, self, result, self.output)
        return result

    def configurations(self) -> list[dict[str, Any]]:
        """A configuration of :func:`alphaext.fit_many` for each gamma."""
        common = {name: getattr(self, name) for name in (*_OF_THE_HEAD, *_OF_THE_TRAINING)}
        common["lr_milestones"] = self.lr_milestones or ()
        return [{**common, "gamma": gamma} for gamma in dict.fromkeys(self.gamma)]


def choose(runs: list[SweepRun], select: str | None, min_all: float | None) -> int:
    """Which of several trainings is best by the policy that chose their epochs; of equal ones the largest gamma.

    Raises:
        FloatingPointError: all of them diverged.
    """

    def score(run: SweepRun) -> tuple[float, float]:
        if run.result is None:
            return -math.inf, 0.0
        before, after = run.result.metrics_before, run.result.metrics_after
        if before is None or after is None or select == "last":
            return (0.0 if after is None else after["all"]), run.config["gamma"]
        bound = before["all"] if min_all is None else min_all
        return selection_score(select or "best_all", after, bound), run.config["gamma"]

    best = max(range(len(runs)), key=lambda number: score(runs[number]))
    if runs[best].result is None:
        raise FloatingPointError("; ".join(dict.fromkeys(run.error for run in runs)))
    return best


def _candidate(run: SweepRun) -> dict[str, Any]:
    if run.result is None:
        return {"gamma": run.config["gamma"], "error": run.error}
    return {
        "gamma": run.config["gamma"],
        "epoch": run.result.selected_epoch,
        "after": run.result.after,
        "clamped": run.result.clamped,
    }


def _save(head: AlphaNet, folder: Path) -> None:
    from ..checkpoints import save_linear

    save_linear(head.fold(), folder / shared.CLASSIFIER, overwrite=True)
    with whole_file(folder / shared.HEAD) as file:
        torch.save({name: value.cpu() for name, value in head.state_dict().items()}, file)


def _print(console: Console, options: Fit, result: dict[str, Any], folder: Path) -> None:
    if result["before"] is not None:
        table = Table(title="Top-1 accuracy on validation features, %")
        for name in ("", "few", "medium", "many", "all"):
            table.add_column(name, justify="left" if not name else "right")
        rows = [
            (shared.classifier_name(options.classifier), result["before"]),
            (f"Alpha Net, gamma {result['gamma']:g}", result["after"]),
        ]
        for name, metrics in rows:
            table.add_row(Text(name), *(percent(metrics[split]) for split in ("few", "medium", "many", "all")))
        console.print(table)
        if len(result["candidates"]) > 1:
            gammas = ", ".join(f"{candidate['gamma']:g}" for candidate in result["candidates"])
            console.print(f"gamma {result['gamma']:g} chosen of {gammas} by {result['selection']}", highlight=False)
    for candidate in result["candidates"]:
        if "error" in candidate:
            console.print(f"gamma {candidate['gamma']:g}: {candidate['error']}", markup=False, highlight=False)
    console.print(f"Classifier: {folder / shared.CLASSIFIER}", markup=False, highlight=False, soft_wrap=True)
