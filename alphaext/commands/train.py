"""``alphaext train``: a network and its classifier, trained together in the plain way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

import alphaext

from . import results
from .options import kinds_of, option
from .shared import PRECISIONS, CommonOptions, DataOptions, ModelOptions

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
    goes_on: ClassVar[bool] = True
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
    precision: str = option(
        "float32", choices=PRECISIONS, help="what the network computes in; bfloat16 is faster where the processor has it"
    )
    sync_batch_norm: bool = option(False, help="batch normalisation over all processes; GPUs only")
    select: str | None = option(
        None, choices=("best_all", "last"), help="which epoch; without, best_all where there are validation images"
    )
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
        # Its own options have the names of train_model's.
        options = {kind.name: getattr(self, kind.name) for kind in kinds_of(Train) if kind.section == "train"}
        for name in ("output", "overwrite"):
            del options[name]
        with results.output_folder(self.output, self, overwrite=self.overwrite, started=started, lock=False) as folder:
            if self.overwrite and results.is_main_process():
                for name in _OF_THE_TRAINING:
                    (folder.path / name).unlink(missing_ok=True)
            result = alphaext.pretraining.train_model(
                model,
                images,
                folder.path,
                transform=self.train_transform(model),
                val_images=val,
                val_transform=None if val is None else self.test_transform(model),
                few_below=self.few_below,
                many_above=self.many_above,
                device=self.device,
                seed=self.seed,
                progress=self.always_shown(),
                **options,
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
