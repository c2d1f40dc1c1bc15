"""``alphaext train``: a network and its classifier, trained together in the plain way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from . import shared
from .options import option
from .shared import CommonOptions, DataOptions, ModelOptions

# What train_model writes, and goes on from.
_OF_THE_TRAINING = ("training.pt", "model.pth", "history.json")


@dataclass(frozen=True, kw_only=True)
class Train(CommonOptions, DataOptions, ModelOptions):
    """Train a network on images in the plain way: the joint classifier that everything else starts from.

    The defaults are those of Kang et al. (ICLR 2020) on ImageNet-LT. After each epoch training.pt is rewritten, from which the
    same command goes on; at the end model.pth has the weights, as plain torchvision code loads them. Several processes share
    the work: torchrun --nproc-per-node 8 -m alphaext train ...

    Example:
        alphaext train --train train.txt --val val.txt --root images --backbone resnext50_32x4d --output joint
    """

    section: ClassVar[str] = "train"
    output: Path = option(metavar="FOLDER", help="where results go")
    overwrite: bool = option(False, help="start anew and replace what is there; without, an interrupted training goes on")
    epochs: int = option(90, help="of training")
    batch_size: int = option(512, help="images a step, over all processes")
    lr: float = option(0.2, help="learning rate; some 1e-3 for adamw")
    momentum: float = option(0.9, help="of SGD")
    nesterov: bool = option(False, help="Nesterov momentum")
    weight_decay: float = option(5e-4, help="of all parameters")
    schedule: str = option("cosine", choices=("cosine", "step", "constant"), help="how the learning rate falls")
    warmup_epochs: int = option(0, help="epochs in which the learning rate rises, before")
    lr_step: int = option(30, help="epochs between falls, under step")
    lr_factor: float = option(0.1, help="what a fall multiplies by")
    optimizer: str = option("sgd", choices=("sgd", "adamw"), help="what takes the steps")
    sampling: str = option(
        "instance", choices=("instance", "class_balanced", "square_root"), help="how an epoch's images are drawn"
    )
    label_smoothing: float = option(0.0, help="share of the target spread over all classes")
    amp: str | None = option(None, choices=("bfloat16", "float16"), help="mixed precision")
    sync_batch_norm: bool = option(False, help="batch normalisation over all processes; GPUs only")
    select: str | None = option(
        None, choices=("best_all", "last"), help="which epoch; without, best_all where there are validation images"
    )
    workers: int | None = option(None, metavar="N", help="processes that read images; without, one a processor, at most twelve")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Train and write; returns what result.json holds."""
        from ..metrics.terminal import metrics_table
        from ..pretraining.train import train_model

        console, started = shared.console_or_quiet(console), time.monotonic()
        images = self.need("train")
        val = self.images("val", num_classes=images.num_classes, class_names=images.class_names)
        model = self.model(images.num_classes, self.seed)
        if self.checkpoint is not None:
            from ..models.zoo import find_classifier

            layer = self.classifier_layer or find_classifier(model.eval(), self.example())
            self.read_checkpoint(images.num_classes).load_into(model, layer)
        names = (
            "epochs",
            "batch_size",
            "lr",
            "momentum",
            "nesterov",
            "weight_decay",
            "schedule",
            "warmup_epochs",
            "lr_step",
            "lr_factor",
        )
        more = ("optimizer", "sampling", "label_smoothing", "amp", "sync_batch_norm", "select", "workers", "seed", "progress")
        with shared.output_folder(self.output, overwrite=self.overwrite, lock=False) as folder:
            if self.overwrite and shared.is_main_process():
                for name in _OF_THE_TRAINING:
                    (folder.path / name).unlink(missing_ok=True)
            result = train_model(
                model,
                images,
                folder.path,
                transform=self.train_transform(),
                val_images=val,
                val_transform=None if val is None else self.test_transform(),
                few_below=self.few_below,
                many_above=self.many_above,
                device=self.device,
                **{name: getattr(self, name) for name in (*names, *more)},
            )
            found = {
                "model": str(result.model_path),
                "epoch": result.selected_epoch,
                "selection": result.selection,
                "metrics": result.metrics,
                "history": result.history,
                "images_per_second": result.images_per_second,
            }
            if shared.is_main_process():
                folder.clear()
                shared.write_results(folder.path, "train", self, found, started)
        if result.metrics is not None:
            console.print(
                metrics_table({f"epoch {result.selected_epoch}": result.metrics}, title="Accuracy on validation images, %")
            )
        console.print(f"Model: {result.model_path}", markup=False, highlight=False, soft_wrap=True)
        return found
