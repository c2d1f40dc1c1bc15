"""Training on class-balanced samples, epoch by epoch: the epoch that validation selects, the checkpoint, the progress bar.

What is trained, and how a step moves it, is a :class:`Model`'s (:mod:`alphaext.baselines.retraining`).
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from torch import Tensor, nn

from ..classes import ClassSplit, class_counts, split_classes
from ..training.cached_logits import check_samples, data_digest
from ..training.options import TrainingOptions
from ..training.selection import BaselineResult, Policy, Validation, unfit_to_choose
from ..utils.progress import task_bar
from ..utils.resume import ResumableTraining, check_alike
from ..utils.tensors import LabelledFeatures, TensorLike, check_finite, optional_features_and_labels
from .balanced_sampling import ClassBalancedSampler

# Elements of a block of features that are checked at a time.
_BLOCK_ELEMENTS = 1 << 22


class Model(ABC):
    """What is trained: its tensors, and how a step moves them."""

    first_candidate = 1  # the first epoch that can be selected
    blocks = 0  # of what :meth:`prepare` does
    parameters: list[Tensor]
    momentum: list[Tensor]

    def prepare(self, report: Callable[[], None]) -> None:  # noqa: B027 (not all have something to prepare)
        """Compute what all steps need, block by block."""

    @abstractmethod
    def step(self, indices: Tensor, lr: float) -> Tensor:
        """Train on the samples ``indices``; the sum of their losses."""

    @abstractmethod
    def accuracy(self, validation: Validation) -> dict[str, float]: ...


class BalancedTraining(ResumableTraining):
    """One training: what it is given, checked, the epochs, the best so far, and the checkpoint they go into."""

    model: Model

    def __init__(
        self,
        name: str,
        weight: Tensor,
        features: TensorLike | LabelledFeatures,
        labels: TensorLike | None,
        options: TrainingOptions,
        images_per_class: int,
        *,
        original: tuple[Tensor, Tensor | None] | None,
        val_features: TensorLike | LabelledFeatures | None,
        val_labels: TensorLike | None,
        split: ClassSplit | None,
        select: str | None,
        min_all: float | None,
    ) -> None:
        """Of ``weight`` only the shape matters; ``original`` is the classifier to compare with, and all others are crt's."""
        super().__init__(f"one of {name}'s", {"parameters": list, "momentum": list, "selected": list})
        self.name, self.options = name, options
        self.samples = check_samples(weight, features, labels)
        self.samples.check()  # all rows are read
        self.sampler = sampler = ClassBalancedSampler(
            self.samples.labels, len(weight), seed=options.seed, images_per_class=images_per_class
        )
        val_features, val_labels = optional_features_and_labels(val_features, val_labels, "val_features", "val_labels")
        split = split_classes(class_counts(self.samples.labels, len(weight))) if split is None else split
        self.validation: Validation | None = None
        self.before: dict[str, float] | None = None
        if val_features is not None and val_labels is not None:
            self.validation = Validation(val_features, val_labels, split, weight)
            self.before = None if original is None else self.validation.of_layer(*original)
        measured = None if self.validation is None else self.validation.samples.labels
        self.policy = Policy.of(select, min_all, measured, split.few).bounded(self.before)
        self.doubt = ""
        if self.validation is not None and self.policy.select != "last":
            self.doubt = unfit_to_choose(self.validation.samples.labels, self.validation.split)
            self.policy = Policy("last") if self.doubt else self.policy
        rows = max(1, _BLOCK_ELEMENTS // max(weight.shape[1], 1))
        for start in range(0, len(self.samples.features), rows):
            # A diverging training would not tell what is not finite from a large learning rate.
            check_finite(self.samples.features[start : start + rows], self.samples.name, first_row=start)
        self.batch_size = min(options.batch_size, len(sampler))
        # As Kang et al.: what fills no batch is left out, for a batch of few samples would move the classifier as far.
        self.steps = len(sampler) // self.batch_size
        self.settings = {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "lr": options.lr,
            "lr_schedule": options.lr_schedule,
            "momentum": options.momentum,
            "weight_decay": options.weight_decay,
            "images_per_class": sampler.images_per_class,
            "seed": options.seed,
        }

    def train(self, model: Model, path: Path | None, progress: bool | None, *classifier: Tensor | None) -> None:
        """Train ``model`` for what is left of the epochs; ``classifier`` is what it is frozen on, for the checkpoint."""
        self.model, parameter = model, model.parameters[0]
        parts, val = list(classifier), None
        if self.validation is not None:
            parts, val = [*parts, self.validation.split.few, self.validation.split.many], self.validation.samples
        self.identity = {"baseline": self.name, **self.settings, "select": self.policy.select, "min_all": self.policy.min_all}
        self.identity |= {"dtype": str(parameter.dtype), "tensors": len(model.parameters)}
        self.identity |= {"classifier and data": data_digest(self.samples, val, *parts)}
        if path is not None and path.exists():
            state = self.load(path, parameter.device)
            with self.applying(path):
                for name in ("parameters", "momentum", "selected"):
                    check_alike(state[name], self.model.momentum if name == "momentum" else self.model.parameters, name)
                self.model.parameters[:], self.model.momentum[:] = state["parameters"], state["momentum"]
        elif self.model.first_candidate == 0:
            self._record({"epoch": 0, "loss": math.nan, "lr": self.options.lr})
        first = len(self.history) + self.model.first_candidate
        if first > self.options.epochs:
            return
        total = self.model.blocks + self.steps * self.options.epochs
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
        bar = task_bar(progress, self.name, *columns, total=total, done=self.steps * (first - 1))
        with torch.autocast(parameter.device.type, enabled=False), bar as report:
            self.model.prepare(report)
            for epoch in range(first, self.options.epochs + 1):
                lr = self.options.lr * self.options.lr_multiplier(epoch)
                self._record({"epoch": epoch, "loss": self._train_epoch(epoch, lr, report), "lr": lr})
                report(0, description=f"epoch {epoch}  {self.last_epoch()}")
                if path is not None:
                    self.save(path, parameters=self.model.parameters, momentum=self.model.momentum)

    def result(self, linear: nn.Linear, settings: dict[str, Any], started: float) -> BaselineResult:
        """What came of it."""
        return BaselineResult(
            name=self.name,
            linear=linear,
            chosen={"epoch": self.selected_epoch},
            table=self.history,
            policy=str(self.policy),
            settings=self.settings | settings,
            seconds=time.monotonic() - started,
            original=self.before,
        )

    def _train_epoch(self, epoch: int, lr: float, report: Callable[[], None]) -> float:
        """Train one epoch; its mean loss."""
        order = self.sampler.draw(epoch)
        loss = torch.zeros((), dtype=torch.float64, device=self.model.parameters[0].device)
        for step in range(self.steps):
            # In the order of the data, which a memory map is read fastest in: within a batch the order is of no interest.
            batch = order[step * self.batch_size : (step + 1) * self.batch_size].sort().values
            loss += self.model.step(batch, lr)
            report()
        mean = float(loss) / (self.steps * self.batch_size)
        if not math.isfinite(mean) or not all(bool(torch.isfinite(tensor).all()) for tensor in self.model.parameters):
            raise FloatingPointError(
                f"training diverged: the loss is no longer finite in epoch {epoch} (lr {lr:g}); a smaller lr may help"
            )
        return mean

    def _record(self, entry: dict[str, Any]) -> None:
        """Measure an epoch and take it up."""
        if self.validation is not None:
            entry.update(self.model.accuracy(self.validation))
        if self.add_epoch(entry, self.policy.score(entry)):
            self.selected = [tensor.clone() for tensor in self.model.parameters]
