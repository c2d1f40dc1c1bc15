"""``alphaext extract``: images to cached features, once."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import alphaext

from ..utils.checks import PRECISIONS, check_integer
from ..utils.files import check_no_file, read_json
from . import results
from .options import option
from .shared import PARTS, CommonOptions, DataOptions, FeaturesOptions, ModelOptions


@dataclass(frozen=True, kw_only=True)
class Extract(CommonOptions, FeaturesOptions, DataOptions, ModelOptions):
    """Turn images into the features that go into the last layer, and keep them.

    One folder for each part that is given (train, val, test) in the features folder. What was interrupted goes on where it
    stopped; what is complete is used again, unless model, images or transform have changed: then nothing is touched and an
    error says so. Several processes share the work: torchrun --nproc-per-node 2 -m alphaext extract ...

    Example:
        alphaext extract --train train.txt --val val.txt --test test.txt --root images \\
            --backbone resnext50_32x4d --checkpoint trained.pth --features features
    """

    section: ClassVar[str] = "extract"
    goes_on: ClassVar[bool] = True
    dtype: str = option("float16", choices=("float16", "float32"), help="of the features on disk")
    precision: str = option("float32", choices=PRECISIONS, help="what the network computes in; features differ")
    batch_size: int | None = option(
        None, help="images at a time; without, what the folder says, or else 16 on a CPU and 64 on a GPU"
    )
    processes: int | None = option(
        None, metavar="N", help="processes that compute on a CPU, one thread each; without, one a core; 0 computes in this one"
    )
    workers: int = option(
        0, metavar="N", help="processes that read images, beside each one that computes; 0 reads where the network computes"
    )
    passes: int = option(1, help="features of each training image: above 1, each pass augments anew (training part only)")
    skip_unreadable: bool = option(False, help="leave out images that cannot be read, and count them")

    def run(self, console: Console | None = None, *, checked: bool = False) -> dict[str, Any]:
        """Extract all parts that are given; returns, for each, how many images, how wide, what was skipped.

        Whether the network knows its images is asked first, unless that was ``checked`` before.
        """
        from ..utils.processes import keep_freed_memory, process_group, processors_per_process

        console, started = results.console_or_quiet(console), time.monotonic()
        named = [part for part in PARTS if getattr(self, part) is not None]
        if not named:
            raise ValueError("--train, --val or --test must be given, or train, val, test in [data] of the configuration")
        check_integer(self.passes, "passes", minimum=1)
        with process_group(self.device) as group:
            on_cpu = group.device.type == "cpu"
            processes = self.processes if self.processes is not None else processors_per_process() if on_cpu else 0
            if on_cpu:
                keep_freed_memory()
            model = self.trained_model(self.num_classes, group.device)
            parts = self._open(named, model.num_classes, self.class_names(model.model))
            before = self._earlier_results()
            begun = [part for part in parts if (self.features / part).exists()]
            with group.together():
                if group.is_main and not begun and not checked:
                    self._check_accuracy(console, model, next(iter(parts.values())))
            if group.is_main:
                self.features.mkdir(parents=True, exist_ok=True)
            group.barrier()
            found: dict[str, Any] = {}
            if group.is_main:
                self.tell_transform(console, self.test_transform(model.model), model.model)
            for number, (part, images) in enumerate(parts.items(), start=1):
                complete = (self.features / part / "features.json").exists()
                several = part == "train" and self.passes > 1
                features = alphaext.features.extract(
                    model,
                    images,
                    self.features / part,
                    transform=self.train_transform(model.model) if several else self.test_transform(model.model),
                    dtype=self.dtype,
                    precision=self.precision,
                    batch_size=self.batch_size,
                    processes=processes,
                    workers=self.workers,
                    passes=self.passes if several else 1,
                    device=group.device,
                    skip_unreadable=self.skip_unreadable,
                    seed=self.seed,
                    progress=self.always_shown(),
                    title=f"{part} (part {number} of {len(parts)})",
                )
                if complete and group.is_main and not self.quiet:
                    print(f"{part} (part {number} of {len(parts)}): already complete", file=sys.stderr)
                found[part] = {
                    "folder": str(self.features / part),
                    "samples": len(features.labels),
                    "width": int(features.features.shape[1]),
                    "dtype": self.dtype,
                    "skipped": [entry["name"] for entry in features.metadata.get("skipped", [])],
                }
            if group.is_main:
                # Nothing is written where nothing is new: a folder of features may be read-only.
                if before != before | found:
                    results.write_results(self.features, self, before | found, started)
                _print(console, found)
        return found

    def _check_accuracy(
        self, console: Console, model: alphaext.models.SplitModel, images: alphaext.data.LabelledImages
    ) -> None:
        """Before an hour is spent: does the network know its images?"""
        finding = self.accuracy(model, images)
        if finding.level == "note":
            console.print(f"Before all: {finding.detail}", markup=False, highlight=False)
        self.refuse_chance(finding)

    def _open(self, parts: list[str], num_classes: int, names: Sequence[str] | None) -> dict[str, alphaext.data.LabelledImages]:
        """The images of all parts, before any of them is extracted."""
        order = self.class_order(names, num_classes)
        return {part: self.need(part, num_classes=num_classes, class_names=order) for part in parts}

    def _earlier_results(self) -> dict[str, Any]:
        """What an earlier extraction into this folder found, of other parts too."""
        check_no_file(self.features, "features")
        if not (self.features / results.RUN).is_file():
            return {}
        command = read_json(self.features / results.RUN, "a run of alphaext").get("command")
        if command != "extract":
            raise ValueError(f"features must be a folder of features, {str(self.features)!r} holds the results of {command!r}")
        return results.read_result(self.features) if (self.features / results.RESULT).is_file() else {}


def _print(console: Console, found: dict[str, Any]) -> None:
    counted = (Column(name, justify="right", overflow="fold") for name in ("samples", "width", "skipped"))
    table = Table(Column("part", overflow="fold"), *counted, Column("folder", overflow="fold"), title="Cached features")
    for part, result in found.items():
        numbers = (str(result["samples"]), str(result["width"]), str(len(result["skipped"])))
        table.add_row(part, *numbers, Text(result["folder"]))
    console.print(table)
