"""Training on class-balanced samples, epoch by epoch: the epoch that validation selects, the checkpoint, the progress bar.

What is trained, and how a step moves it, is a :class:`Model`'s (:mod:`alphaext.baselines.retraining`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from torch import Tensor, nn

from ..training.cached_logits import Samples
from ..training.options import TrainingOptions
from ..training.selection import BaselineResult, Policy, Validation
from ..utils.progress import task_bar
from ..utils.resume import ResumableTraining
from ..utils.tensors import tensor_digest
from .balanced_sampling import ClassBalancedSampler


class Model(Protocol):
    """What is trained: its tensors, and how a step moves them."""

    first_candidate: int  # the first epoch that can be selected
    parameters: list[Tensor]
    momentum: list[Tensor]
    blocks: int  # of what :meth:`prepare` does

    def prepare(self, report: Callable[[], None]) -> None: ...

    def step(self, indices: Tensor, lr: float) -> Tensor:
        """Train on the samples ``indices``; the sum of their losses."""

    def accuracy(self, validation: Validation) -> dict[str, float]: ...


class BalancedTraining(ResumableTraining):
    """One training: the epochs, the best so far, and the checkpoint they go into."""

    def __init__(
        self,
        name: str,
        model: Model,
        options: TrainingOptions,
        sampler: ClassBalancedSampler,
        validation: Validation | None,
        policy: Policy,
    ) -> None:
        super().__init__(f"one of {name}'s", {"parameters": list, "momentum": list, "selected": list})
        self.name, self.model, self.options, self.sampler = name, model, options, sampler
        self.validation, self.policy = validation, policy
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

    def train(self, path: Path | None, progress: bool | None, data: dict[str, str]) -> None:
        """Train what is left of the epochs; ``data`` tells data sets apart, for the checkpoint."""
        parameter = self.model.parameters[0]
        self.identity = {"baseline": self.name, **self.settings, "select": self.policy.select, "min_all": self.policy.min_all}
        self.identity |= {"dtype": str(parameter.dtype), "tensors": len(self.model.parameters), **data}
        if path is not None and path.exists():
            state = self.load(path, parameter.device)
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
                report(0, description=_description(self.history[-1]))
                if path is not None:
                    self.save(path, parameters=self.model.parameters, momentum=self.model.momentum)

    def result(
        self, linear: nn.Linear, original: dict[str, float] | None, settings: dict[str, Any], started: float
    ) -> BaselineResult:
        """What came of it."""
        chosen = {"epoch": self.selected_epoch}
        seconds = time.monotonic() - started
        policy = str(self.policy)
        return BaselineResult(self.name, linear, chosen, self.history, policy, self.settings | settings, seconds, original)

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
        score = float(entry["epoch"]) if self.policy.select == "last" else self.policy.score(entry)
        self.add_epoch(entry, score, lambda: [tensor.clone() for tensor in self.model.parameters])


def fingerprint(samples: Samples, validation: Validation | None, *tensors: Tensor | None) -> str:
    """Tells data sets apart: a digest of labels and given tensors, and of a thousand rows of the features."""
    parts = [tensor for tensor in tensors if tensor is not None]
    for some in (samples, None if validation is None else validation.samples):
        if some is not None:
            parts += [some.labels, some.features[:: max(1, len(some.features) // 1000)]]
    if validation is not None:
        parts += [validation.split.few, validation.split.medium, validation.split.many]
    return tensor_digest(parts)[:16]


def _description(entry: Mapping[str, Any]) -> str:
    """An epoch in a few words, for the bar."""
    text = f"epoch {entry['epoch']}  loss {entry['loss']:.3f}"
    return f"{text}  few {100 * entry['few']:.1f}  all {100 * entry['all']:.1f}" if "all" in entry else text
