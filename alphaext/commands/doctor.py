"""``alphaext doctor``: what is wrong with the data, or with the installation, before hours are spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

import alphaext

from ..utils.environment import RESULT_DEPENDS_ON, versions
from . import results
from .options import option
from .shared import CommonOptions, DataOptions, FewClassesOptions, ModelOptions


@dataclass(frozen=True, kw_only=True)
class Doctor(CommonOptions, DataOptions, FewClassesOptions, ModelOptions):
    """Check data, or the installation, before hours are spent; all that is wrong is told, not the first thing.

    'doctor data' reads every image: missing and unreadable ones, gaps in the labels, images that are in two parts, splits
    without classes, class orders that differ between lists and checkpoint. With cached features it also asks whether the
    classifier counts the classes as the labels do. 'doctor install' tells versions, how the extension was built, and what
    optional packages are there. The exit code is 2 where there is an error among the findings.

    Example:
        alphaext doctor data --train train.txt --val val.txt --test test.txt --root images --checkpoint trained.pth
    """

    section: ClassVar[str] = "doctor"
    topic: str = option("data", choices=("data", "install"), positional=True, help="what to look at")
    read_images: bool = option(True, help="read and decode every image; without, files are only looked for")
    workers: int | None = option(None, metavar="N", help="threads that read images; without, two a core")
    top_k: int = option(5, help="neighbours that each few class is to have")
    features: Path | None = option(None, help="cached features, to check the classifier's class order by")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Look and tell; returns the findings, and under ``exit_code`` whether there is an error among them."""
        console, started = results.console_or_quiet(console), time.monotonic()
        return self._install(console) if self.topic == "install" else self._data(console, started)

    def _data(self, console: Console, started: float) -> dict[str, Any]:
        checkpoint = None if self.checkpoint is None and self.saved_model is None else self.read_checkpoint()
        if self.features is not None and checkpoint is None:
            raise ValueError("--checkpoint must be given with --features: whose class order is checked")
        part = None if self.features is None else alphaext.features.store.read_parts(self.features, "train")["train"]
        # The lists are opened for what they say themselves: labels beyond the classifier are a finding, not an error here.
        order = None if checkpoint is None else self.class_order(checkpoint.class_names)
        train = self.need("train", class_names=order)
        num_classes = self.num_classes if checkpoint is None else checkpoint.num_classes
        few = None
        if self.few_classes is not None:
            names = self.class_order(None if checkpoint is None else checkpoint.class_names, num_classes)
            few = self.named_classes(num_classes or train.num_classes, names)
        report = alphaext.doctor.check_data(
            train,
            self._opened("val", order),
            self._opened("test", order),
            num_classes=num_classes,
            class_names=None if checkpoint is None else checkpoint.class_names,
            few_below=self.few_below,
            many_above=self.many_above,
            few_classes=few,
            top_k=self.top_k,
            read_images=self.read_images,
            workers=self.workers,
            progress=self.progress,
        )
        if part is not None and checkpoint is not None:
            try:
                part.verify()
                names = report.class_names if part.num_classes == checkpoint.num_classes else None
                found = alphaext.doctor.check_classifier_order(
                    checkpoint.linear(), part.features, part.labels, class_names=names
                )
            except (ValueError, TypeError) as error:
                found = alphaext.doctor.Finding("error", "checkpoint and features do not fit", str(error))
            report.problems.append(found)
        if self.backbone is not None and checkpoint is not None:
            report.problems.append(self._accuracy(train, checkpoint.num_classes))
        report.seconds = time.monotonic() - started
        report.print(console)
        return {**report.to_dict(), "exit_code": 0 if report.ok else 2}

    def _opened(self, part: str, order: Sequence[str] | None) -> alphaext.data.LabelledImages | None:
        try:
            return self.images(part, class_names=order)
        except ValueError:  # classes that the training data do not have: a finding
            return self.images(part)

    def _accuracy(self, images: alphaext.data.LabelledImages, num_classes: int) -> alphaext.doctor.Finding:
        from ..utils.processes import keep_freed_memory

        try:
            device = self.chosen_device()
            if device.type == "cpu":
                keep_freed_memory()
            found = self.accuracy(self.trained_model(num_classes, device), images)
            if found.level != "error":
                return found
            if self.allow_chance:
                return replace(found, level="warning")
            return replace(
                found, detail=f"{found.detail}; --allow-chance, or allow_chance = true in [model], goes on all the same"
            )
        except (ValueError, TypeError) as error:
            return alphaext.doctor.Finding("error", "the network does not take its weights or its images", str(error))

    def _install(self, console: Console) -> dict[str, Any]:
        import torch

        installed, built = versions(*RESULT_DEPENDS_ON), alphaext.build_info()
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        for name, version in installed.items():
            console.print(f"{name}: {version or 'not installed'}", highlight=False, markup=False)
        for name, value in built.items():
            console.print(f"extension, {name}: {value}", highlight=False, markup=False)
        console.print(f"GPUs that torch sees: {', '.join(gpus) or 'none'}", highlight=False, markup=False)
        return {"versions": installed, "extension": built, "gpus": gpus}
