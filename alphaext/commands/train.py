"""``alphaext train``: a network and its classifier, trained together in the plain way."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from rich.console import Console

import alphaext

from ..pretraining.options import JointOptions
from . import results
from .options import from_table, option
from .shared import CommonOptions, DataOptions, ModelOptions, OutputOptions

_TABLE = [entry for entry in fields(JointOptions) if entry.metadata["help"]]
# What train_model writes, and goes on from.
_OF_THE_TRAINING = ("training.pt", "model.pth", "history.json")


@dataclass(frozen=True, kw_only=True)
@from_table(_TABLE)
class Train(CommonOptions, DataOptions, OutputOptions, ModelOptions):
    """Train a network on images in the plain way: the joint classifier that everything else starts from.

    The defaults are those of Kang et al. (ICLR 2020) on ImageNet-LT. After each epoch training.pt is rewritten, from which the
    same command goes on; at the end model.pth has the weights, as plain torchvision code loads them. Several processes share
    the work: torchrun --nproc-per-node 8 -m alphaext train ...

    Example:
        alphaext train --train train.txt --val val.txt --root images --backbone resnext50_32x4d --output joint
    """

    section: ClassVar[str] = "train"
    goes_on: ClassVar[bool] = True
    overwrite: bool = option(False, help="start anew and replace what is there; without, an interrupted training goes on")
    workers: int | None = option(None, metavar="N", help="processes that read images; without, one a processor, at most twelve")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Train and write; returns what result.json holds."""
        from ..metrics.terminal import metrics_table
        from ..utils.processes import keep_freed_memory

        console, started = results.console_or_quiet(console), time.monotonic()
        images = self.need("train")
        val = self.images("val", num_classes=images.num_classes, class_names=images.class_names)
        if self.chosen_device().type == "cpu":
            keep_freed_memory()
        model = self.model(images.num_classes, self.seed)
        if self.checkpoint is not None:
            self.load(model, self.read_checkpoint())
        if results.is_main_process():
            self.tell_transform(console, self.train_transform(model), model)
        with results.output_folder(self.output, self, overwrite=self.overwrite, started=started, lock=False) as folder:
            if self.overwrite and results.is_main_process():
                for name in _OF_THE_TRAINING:
                    (folder.path / name).unlink(missing_ok=True)
            val_transform: Any = None if val is None else self.test_transform(model)
            result = alphaext.pretraining.train_model(
                model,
                images,
                folder.path,
                transform=self.train_transform(model),
                val_images=val,
                val_transform=val_transform,
                few_below=self.few_below,
                many_above=self.many_above,
                device=self.device,
                seed=self.seed,
                workers=self.workers,
                progress=self.always_shown(),
                **{entry.name: getattr(self, entry.name) for entry in _TABLE},
            )
            found = {
                "model": str(result.model_path),
                "epoch": result.selected_epoch,
                "selection": result.selection,
                "metrics": result.metrics,
                "history": result.history,
                "images_per_second": result.images_per_second,
            }
            if results.is_main_process():
                folder.clear()
                folder.write(found)
        if result.metrics is not None:
            metrics = {f"epoch {result.selected_epoch}": result.metrics}
            console.print(metrics_table(metrics, title="Accuracy on validation images, %"))
        console.print(f"Model: {result.model_path}", markup=False, highlight=False, soft_wrap=True)
        return found
