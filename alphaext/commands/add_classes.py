"""``alphaext add-classes``: rows for classes that a trained classifier has never seen."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

import alphaext

from . import results
from .options import option
from .shared import ClassifierOptions, CommonOptions, FeaturesOptions, OutputOptions


@dataclass(frozen=True, kw_only=True)
class AddClasses(CommonOptions, FeaturesOptions, OutputOptions, ClassifierOptions):
    """Give a trained classifier rows for classes that it has never seen; its own rows stay as they are.

    The new rows start from near classes' rows and are trained on the new classes' samples, one of each or more, beside samples
    of the old classes. The result is a plain linear layer, the new classes behind the old ones.

    Example:
        alphaext add-classes --features features --classifier crt --new-features new --output crt-and-new
    """

    section: ClassVar[str] = "add-classes"
    new_features: Path = option(
        metavar="FOLDER", help="the folder of the new classes' features, numbered from 0 (train in it), of the same network"
    )

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Make the rows and write the classifier; returns what result.json holds."""
        console, started = results.console_or_quiet(console), time.monotonic()
        (train,) = self.read("train")
        new = alphaext.features.store.read_parts(self.new_features, "train")["train"]
        linear, _ = self.classifier_or_checkpoint(self.classifier, train.num_classes)
        with results.output_folder(self.output, self, results.CLASSIFIER, overwrite=self.overwrite, started=started) as folder:
            made = alphaext.add_classes(
                linear.to(self.chosen_device()),
                train.features,
                train.labels,
                new.features,
                new.labels + train.num_classes,
                seed=self.seed,
                progress=self.progress,
            )
            assert made.head is not None
            names = [*(train.class_names or ()), *(new.class_names or ())]
            result = {
                "old_classes": train.num_classes,
                "new_classes": new.num_classes,
                "class_names": names if len(names) == made.linear.out_features else None,
                "neighbors": {str(own): others for own, *others in made.head.members.tolist()},
                "seconds": time.monotonic() - started,
            }
            folder.write_classifier(made.linear, result)
        text = f"{new.num_classes} classes added to {train.num_classes}: {self.output / results.CLASSIFIER}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return result
