"""``alphaext baseline``: the paper's baselines and the cheap rivals, on cached features."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.table import Column, Table

import alphaext

from ..baselines.choices import BASELINE_OPTIONS, BASELINES, RETRAINING_PRESETS
from ..training.options import SELECTIONS
from ..utils.text import percent
from . import results
from .options import option
from .shared import CheckpointOptions, CommonOptions, FeaturesOptions, FewClassesOptions, OutputOptions

if TYPE_CHECKING:
    from torch import nn

_CHOOSE = {"tau": "tau", "logit-adjustment": "tau", "few-bias": "offset"}
_NEED_A_CLASSIFIER = ("tau", "lws", "logit-adjustment", "few-bias", "average")
_CHECKPOINT = ".alphaext-baseline.pt"  # nobody else's
_SHOWN = 15  # candidates, around the chosen one


@dataclass(frozen=True, kw_only=True)
class Baseline(CommonOptions, FeaturesOptions, FewClassesOptions, OutputOptions, CheckpointOptions):
    """Make a classifier by another method, from cached features.

    What a method leaves open (the tau, the strength, the bias) is chosen on validation features, never on test ones. The result
    is a plain linear layer, which can be evaluated, exported, and given to 'alphaext fit'.

    Example:
        alphaext baseline crt --features features --output crt
    """

    section: ClassVar[str] = "baseline"
    goes_on: ClassVar[bool] = True
    name: str = option(
        choices=tuple(BASELINES),
        positional=True,
        help="ncm: nearest class mean; tau: tau-normalised rows; crt: classifier re-trained with class-balanced samples; "
        "lws: learned scale of each row; logit-adjustment: by the classes' frequencies; few-bias: a constant on few logits; "
        "discriminant: class means and one covariance, few means composed with near ones; "
        "average: a weighted sum of two classifiers",
    )
    classifier: Path | None = option(
        None, help="the trained classifier, which all but ncm, crt and discriminant start from; without, --checkpoint"
    )
    select: str | None = option(
        None,
        choices=SELECTIONS,
        help="what a choice on validation features goes by; without, best_all (crt and lws without validation features: last)",
    )
    min_all: float | None = option(None, help="under best_few: the least accuracy over all; without, the classifier's own")
    tau: float | None = option(
        None,
        help="of tau and logit-adjustment; without, chosen from 0, 0.1 ... 2. Of discriminant: so many samples "
        "weigh as much as the neighbours' mean; without, estimated",
    )
    keep_bias: bool | None = option(None, help="tau: keep the bias, which is dropped otherwise")
    offset: float | None = option(None, help="of few-bias; without, chosen")
    metric: str | None = option(None, choices=("cosine", "euclidean"), help="of ncm; without, cosine")
    center: bool | None = option(None, help="ncm: measure angles from the mean of all samples")
    normalize: bool | None = option(None, help="ncm: means of features of length 1")
    top_k: int | None = option(None, help="discriminant: nearest base classes that a mean is composed with; without, 5")
    compose: str | None = option(None, choices=("few", "all"), help="discriminant: whose means are composed; without, few")
    shrinkage: float | None = option(None, help="discriminant: of the covariance, 0 to 1; without, by Ledoit and Wolf's rule")
    other: Path | None = option(None, help="average: a second classifier; without, the discriminant")
    preset: str = option(
        "imagenet-lt",
        choices=tuple(RETRAINING_PRESETS),
        help="whose settings of Kang et al. crt and lws take for what is not given below",
    )
    epochs: int | None = option(None, help="of crt and lws")
    batch_size: int | None = option(None, help="of crt and lws")
    lr: float | None = option(None, help="learning rate of crt and lws")
    momentum: float | None = option(None, help="of crt and lws")
    weight_decay: float | None = option(None, help="of crt and lws")
    images_per_class: int | None = option(None, help="crt and lws: images drawn of a class in a row")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Make the classifier and write it; returns what result.json holds."""
        console, started = results.console_or_quiet(console), time.monotonic()
        train, val = self.read_train_and_val()
        if val is None and self.name in _CHOOSE and getattr(self, _CHOOSE[self.name]) is None:
            raise ValueError(
                f"--{_CHOOSE[self.name]} must be given for {self.name} where there are no validation features to choose it by: "
                f"there is no {str(self.features / 'val')!r}"
            )
        split = self.split_to_repair(train) if self.name == "few-bias" else self.split(train)
        linear = None
        if self.classifier is not None or self.name in _NEED_A_CLASSIFIER:
            linear, _ = self.classifier_or_checkpoint(self.classifier, train.num_classes)
        with results.output_folder(self.output, self, results.CLASSIFIER, overwrite=self.overwrite, started=started) as folder:
            if self.overwrite:
                (folder.path / _CHECKPOINT).unlink(missing_ok=True)
            made = self._make(train, val, split, linear, folder.path)
            result = made.to_dict()
            folder.write_classifier(made.linear, result)
            (folder.path / _CHECKPOINT).unlink(missing_ok=True)
        self._print(console, result, self.output)
        return result

    def _make(
        self,
        train: alphaext.features.Features,
        val: alphaext.features.Features | None,
        split: alphaext.ClassSplit,
        linear: nn.Linear | None,
        folder: Path,
    ) -> alphaext.baselines.BaselineResult:
        # What is of another baseline is passed over: one configuration serves them all.
        options = {key: getattr(self, key) for key in BASELINE_OPTIONS[self.name] if getattr(self, key, None) is not None}
        if self.name in RETRAINING_PRESETS[self.preset]:
            options = RETRAINING_PRESETS[self.preset][self.name] | options
            options["checkpoint"] = folder / _CHECKPOINT
        if "other" in options:
            options["other"] = results.read_classifier(options["other"], train.num_classes)
        return alphaext.baselines.run_baseline(
            self.name,
            train.features,
            train.labels,
            linear=linear,
            val_features=None if val is None else val.features,
            val_labels=None if val is None else val.labels,
            class_counts=train.class_counts(),
            split=split,
            select=self.select,
            min_all=self.min_all,
            **options,
        )

    def _print(self, console: Console, result: dict[str, Any], folder: Path) -> None:
        if result.get("table"):
            parts = ("few", "medium", "many", "all")
            names = [name for name in result["table"][0] if name not in parts]
            columns = (Column(name, justify="right") for name in (*names, *parts))
            table = Table(*columns, title=f"{self.name}: top-1 accuracy on validation features, %")
            is_chosen = [all(result["chosen"].get(name) == row[name] for name in names) for row in result["table"]]
            first = max(0, is_chosen.index(True) - _SHOWN // 2) if True in is_chosen else 0
            for row, chosen in list(zip(result["table"], is_chosen, strict=True))[first : first + _SHOWN]:
                own = (f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in names)
                cells = (percent(row.get(part)) for part in parts)
                table.add_row(*own, *cells, style="bold" if chosen else None)
            if len(result["table"]) > _SHOWN:
                table.caption = f"{_SHOWN} of {len(result['table'])} candidates; all are in {results.RESULT}"
            console.print(table)
        console.print(f"Classifier: {folder / results.CLASSIFIER}", markup=False, highlight=False, soft_wrap=True)
