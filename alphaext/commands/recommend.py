"""``alphaext recommend``: which of all methods to take, on cached features."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from rich.console import Console

import alphaext

from ..training.options import CHOOSING
from ..utils.files import without_nan
from . import results
from .options import option
from .shared import ClassifierOptions, CommonOptions, FeaturesOptions, FewClassesOptions, OutputOptions


@dataclass(frozen=True, kw_only=True)
class Recommend(CommonOptions, FeaturesOptions, FewClassesOptions, OutputOptions, ClassifierOptions):
    """Measure cheap rivals, baselines and presets alike, and say which does most for a classifier.

    What a method leaves open is chosen on four fifths of the validation features, and it is measured on the rest, in turn;
    without validation features likewise within the training features. Of what differs by no more than noise that is recommended
    under which the labels are likeliest. The result is its classifier, a plain linear layer.

    Example:
        alphaext recommend --features features --classifier joint --output recommended
    """

    section: ClassVar[str] = "recommend"
    policy: str = option("best_all", choices=CHOOSING, help="accuracy over all, or few accuracy of those that keep --min-all")
    min_all: float | None = option(
        None, help="under best_few: the least accuracy over all, up to 1; without, the classifier's own"
    )
    max_base_drop: float | None = option(
        None, metavar="POINTS", help="what the accuracy over base classes may lose; without, any"
    )

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Compare, print, write the recommended classifier; returns what result.json holds."""
        console, started = results.console_or_quiet(console), time.monotonic()
        train, val = self.read_train_and_val()
        split = self.split_to_repair(train)
        linear, _ = self.classifier_or_checkpoint(self.classifier, train.num_classes)
        with results.output_folder(self.output, self, results.CLASSIFIER, overwrite=self.overwrite, started=started) as folder:
            found = alphaext.recommend(
                linear.to(self.chosen_device()),
                train,
                val_features=val,
                policy=self.policy,
                min_all=self.min_all,
                max_base_drop=self.max_base_drop,
                split=split,
                seed=self.seed,
            )
            candidates = [without_nan(asdict(candidate)) for candidate in found.candidates]
            result = {"method": found.method, "advice": found.advice, "candidates": candidates}
            folder.write_classifier(found.linear, result)
        for line in (str(found), f"Classifier: {self.output / results.CLASSIFIER}"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return result
