"""``alphaext evaluate``: classifiers side by side on cached features."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

import alphaext

from ..utils.checks import PRECISIONS
from . import results
from .options import option
from .shared import PARTS, CheckpointOptions, CommonOptions, FeaturesOptions, FewClassesOptions


@dataclass(frozen=True, kw_only=True)
class Evaluate(CommonOptions, FeaturesOptions, FewClassesOptions, CheckpointOptions):
    """Measure classifiers on cached features: what each gains over the first, what it costs, and who pays.

    Top-1 and top-5 of few, medium, many and all classes with bootstrap intervals; each classifier compared with the first,
    sample by sample; and class by class, with neighbours and coefficients where it is a folder that 'alphaext fit' wrote.

    Example:
        alphaext evaluate crt alpha-crt --features features --output evaluation
    """

    section: ClassVar[str] = "evaluate"
    classifiers: tuple[Path, ...] = option(
        (),
        positional=True,
        metavar="CLASSIFIER",
        help="checkpoints of any known layout, or folders that a command wrote; before one alone comes --checkpoint",
    )
    part: str = option("test", choices=PARTS, help="which features to measure on")
    resamples: int = option(1000, help="of the bootstrap")
    confidence: float = option(0.95, help="of the intervals")
    classes: int = option(10, metavar="N", help="classes to show that gained most, and that lost most; 0 for none")
    output: Path | None = option(
        None,
        metavar="FOLDER",
        help="where result.json and, for all classifiers but the first, a table of all classes (.csv) go",
    )
    precision: str = option("float32", choices=PRECISIONS, help="what the classifiers compute in; scores differ")
    overwrite: bool = option(False, help="replace results that are there")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Measure, print, write; returns what result.json holds."""
        from ..metrics import terminal

        console, started = results.console_or_quiet(console), time.monotonic()
        given: list[Path | None] = [*self.classifiers]
        if len(given) < 2 and (self.checkpoint or self.saved_model) and given != [self.checkpoint]:
            given.insert(0, None)  # the checkpoint
        if not given:
            raise ValueError("CLASSIFIERS must be given at least one, got none")
        train, part = self.read("train", self.part)
        split, device = self.split(train), self.chosen_device()
        linears, paths = zip(*(self.classifier_or_checkpoint(path, train.num_classes) for path in given), strict=True)
        names, heads = results.classifier_names(paths), [results.read_head(path) for path in paths]
        for linear, path in zip(linears, paths, strict=True):
            results.warn_of_other_features(linear, part, str(path))
        tables = [f"{name}.csv" for name in names[1:]]
        with ExitStack() as stack:
            folder = None
            if self.output is not None:
                opened = results.output_folder(self.output, self, *tables, overwrite=self.overwrite, started=started)
                folder = stack.enter_context(opened)
            bootstrap: dict[str, Any] = {"resamples": self.resamples, "confidence": self.confidence, "seed": self.seed}
            metrics, intervals, calibration, predictions = {}, {}, {}, {}
            for name, linear in zip(names, linears, strict=True):
                found = alphaext.metrics.predict(
                    linear.to(device), part.features, part.labels, precision=self.precision, progress=self.progress
                )
                predictions[name], metrics[name] = found, alphaext.metrics.split_metrics(found, split)
                intervals[name] = alphaext.metrics.bootstrap_intervals(found, split, **bootstrap)
                calibration[name] = alphaext.metrics.expected_calibration_error(found, split)
            first = predictions[names[0]]
            means = train.class_means() if any(head is not None for head in heads[1:]) else None
            comparisons, rows = {}, {}
            for name, head in zip(names[1:], heads[1:], strict=True):
                comparisons[name] = alphaext.metrics.compare(first, predictions[name], split, **bootstrap)
                rows[name] = alphaext.metrics.class_table(
                    first,
                    predictions[name],
                    split,
                    train.class_counts(),
                    class_names=train.class_names,
                    head=head,
                    class_means=None if head is None else means,
                )
            result = {
                "part": self.part,
                "samples": len(part.labels),
                "classes": {name: len(getattr(split, name)) for name in ("few", "medium", "many", "empty")},
                "confidence": self.confidence,
                "metrics": metrics,
                "intervals": intervals,
                "calibration_error": calibration,
                "comparisons": {name: comparison.to_dict() for name, comparison in comparisons.items()},
                "tables": tables,
            }
            # Written before anything is printed: a terminal that goes away takes no result with it.
            if folder is not None:
                folder.clear()
                for name in names[1:]:
                    alphaext.metrics.write_class_table(rows[name], folder.path / f"{name}.csv", overwrite=True)
                folder.write(result)
        title = f"Accuracy on {len(part.labels):,} {self.part} samples, % ({self.confidence:.0%} intervals)"
        console.print(terminal.metrics_table(metrics, intervals=intervals, title=title))
        for name in names[1:]:
            self._print(console, f"{names[0]} -> {name}", comparisons[name], rows[name], train.class_names)
        if self.output is not None:
            console.print(f"Results: {self.output}", markup=False, highlight=False, soft_wrap=True)
        return result

    def _print(
        self,
        console: Console,
        title: str,
        found: alphaext.metrics.Comparison,
        rows: list[alphaext.metrics.ClassRow],
        class_names: tuple[str, ...] | None,
    ) -> None:
        from ..metrics import terminal

        console.print(terminal.comparison_table(found, title=f"{title}, top-1 accuracy in %"))
        if not self.classes:
            return
        gains = sorted((row for row in rows if row.gain > 0), key=lambda row: (-row.gain, row.class_id))
        if gains:
            console.print(terminal.class_rows_table(gains, limit=self.classes, title="Classes that gained most"))
        if found.paid:
            console.print(terminal.losses_table(found, class_names=class_names, title="Classes that paid most"))
