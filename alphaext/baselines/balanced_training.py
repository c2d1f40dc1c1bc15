"""Training on class-balanced samples, epoch by epoch: the epoch that validation selects, the checkpoint, the progress bar.

What is trained, and how a step moves it, is a :class:`Model`'s (:mod:`alphaext.baselines.retraining`).
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from torch import Tensor, nn

from ..training.cached_logits import Samples
from ..training.options import TrainingOptions
from ..training.selection import BaselineResult, Policy, Validation
from ..utils.files import whole_file
from ..utils.progress import progress_bar
from .balanced_sampling import ClassBalancedSampler

# What a checkpoint holds.
_CHECKPOINT: dict[str, type | tuple[type, ...]] = {
    "identity": dict,
    "parameters": list,
    "momentum": list,
    "table": list,
    "selected": list,
    "selected_epoch": int,
    "selected_score": (int, float),
}


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


class BalancedTraining:
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
        self.name, self.model, self.options, self.sampler = name, model, options, sampler
        self.validation, self.policy = validation, policy
        self.batch_size = min(options.batch_size, len(sampler))
        # As Kang et al.: what fills no batch is left out, for a batch of few samples would move the classifier as far.
        self.steps = len(sampler) // self.batch_size
        self.table: list[dict[str, Any]] = []
        self.selected: list[Tensor] = []
        self.selected_epoch, self.selected_score = 0, -math.inf
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
        self._identity = {"baseline": self.name, **self.settings, "select": self.policy.select, "min_all": self.policy.min_all}
        self._identity |= {"dtype": str(parameter.dtype), "tensors": len(self.model.parameters), **data}
        if path is not None and path.exists():
            self._resume(path)
        elif self.model.first_candidate == 0:
            self._record({"epoch": 0, "loss": math.nan, "lr": self.options.lr})
        first = len(self.table) + self.model.first_candidate
        if first > self.options.epochs:
            return
        total = self.model.blocks + self.steps * self.options.epochs
        bar = _progress_bar(progress, self.name, total, self.steps * (first - 1))
        with torch.autocast(parameter.device.type, enabled=False), bar as (advance, describe):
            self.model.prepare(advance)
            for epoch in range(first, self.options.epochs + 1):
                lr = self.options.lr * self.options.lr_multiplier(epoch)
                self._record({"epoch": epoch, "loss": self._train_epoch(epoch, lr, advance), "lr": lr})
                describe(self.table[-1])
                if path is not None:
                    self._save(path)

    def result(
        self, linear: nn.Linear, original: dict[str, float] | None, settings: dict[str, Any], started: float
    ) -> BaselineResult:
        """What came of it."""
        chosen = {"epoch": self.selected_epoch}
        seconds = time.monotonic() - started
        policy = str(self.policy)
        return BaselineResult(self.name, linear, chosen, self.table, policy, self.settings | settings, seconds, original)

    def _train_epoch(self, epoch: int, lr: float, advance: Callable[[], None]) -> float:
        """Train one epoch; its mean loss."""
        order = self.sampler.draw(epoch)
        loss = torch.zeros((), dtype=torch.float64, device=self.model.parameters[0].device)
        for step in range(self.steps):
            # In the order of the data, which a memory map is read fastest in: within a batch the order is of no interest.
            batch = order[step * self.batch_size : (step + 1) * self.batch_size].sort().values
            loss += self.model.step(batch, lr)
            advance()
        mean = float(loss) / (self.steps * self.batch_size)
        if not math.isfinite(mean) or not all(bool(torch.isfinite(tensor).all()) for tensor in self.model.parameters):
            raise FloatingPointError(
                f"training diverged: the loss is no longer finite in epoch {epoch} (lr {lr:g}); a smaller lr may help"
            )
        return mean

    def _record(self, entry: dict[str, Any]) -> None:
        """Add an epoch to the table, and keep its parameters if it is the one to select so far."""
        if self.validation is not None:
            entry.update(self.model.accuracy(self.validation))
        self.table.append(entry)
        score = float(entry["epoch"]) if self.policy.select == "last" else self.policy.score(entry)
        if score > self.selected_score:
            self.selected = [tensor.clone() for tensor in self.model.parameters]
            self.selected_epoch, self.selected_score = entry["epoch"], score

    def _save(self, path: Path) -> None:
        state = {
            "identity": self._identity,
            "parameters": self.model.parameters,
            "momentum": self.model.momentum,
            "table": self.table,
            "selected": self.selected,
            "selected_epoch": self.selected_epoch,
            "selected_score": self.selected_score,
        }
        with whole_file(path) as file:
            torch.save(state, file)

    def _resume(self, path: Path) -> None:
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.model.parameters[0].device, weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}")
            wrong = [name for name, kind in _CHECKPOINT.items() if not isinstance(state[name], kind)]
            if wrong:
                raise TypeError(f"{wrong[0]} is a {type(state[wrong[0]]).__name__}")
        except Exception as error:  # what torch makes of foreign bytes knows no limits
            raise ValueError(
                f"checkpoint {path} cannot be read as one of {self.name}'s: {type(error).__name__}: {error}"
            ) from error
        for name, value in self._identity.items():
            if state["identity"].get(name) != value:
                raise ValueError(
                    f"checkpoint {path} belongs to another training: {name} is {value!r} here and "
                    f"{state['identity'].get(name)!r} there"
                )
        self.model.parameters[:], self.model.momentum[:] = state["parameters"], state["momentum"]
        self.table, self.selected = state["table"], state["selected"]
        self.selected_epoch, self.selected_score = state["selected_epoch"], state["selected_score"]


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> Path:
    """Return the path after checking that a checkpoint can be there."""
    path = Path(checkpoint)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"checkpoint must be a file in a directory that exists, got {str(path)!r}")
    return path


def fingerprint(samples: Samples, validation: Validation | None, *tensors: Tensor | None) -> str:
    """Tells data sets apart: a digest of labels and given tensors, and of a thousand rows of the features."""
    parts = [tensor for tensor in tensors if tensor is not None]
    for some in (samples, None if validation is None else validation.samples):
        if some is not None:
            parts += [some.labels, some.features[:: max(1, len(some.features) // 1000)]]
    if validation is not None:
        parts += [validation.split.few, validation.split.medium, validation.split.many]
    digest = hashlib.sha256()
    for tensor in parts:
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _progress_bar(
    progress: bool | None, name: str, total: int, done: int
) -> Iterator[tuple[Callable[[], None], Callable[[dict[str, Any]], None]]]:
    columns = (
        TextColumn(name),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
    )
    with progress_bar(progress, *columns) as bar:
        task = bar.add_task("", total=total, completed=done)

        def describe(entry: dict[str, Any]) -> None:
            text = f"epoch {entry['epoch']}  loss {entry['loss']:.3f}"
            if "all" in entry:
                text += f"  few {100 * entry['few']:.1f}  all {100 * entry['all']:.1f}"
            bar.update(task, description=text)

        yield (lambda: bar.advance(task)), describe
