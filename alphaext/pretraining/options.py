"""The options of a joint training, checked, and the learning rates that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..classes import check_thresholds
from ..utils.checks import check_choice, check_flag, check_integer, check_number
from ..utils.modules import PRECISIONS
from .epochs import SAMPLINGS

_INTEGERS = {
    "epochs": (1, 2**31),
    "batch_size": (1, 2**31),
    "warmup_epochs": (0, 2**31),
    "lr_step": (1, 2**31),
    "few_below": (0, 2**40),
    "many_above": (0, 2**40),
    "seed": (0, 2**63 - 1),
}
_NUMBERS: dict[str, dict[str, float]] = {
    "lr": {"above": 0},
    "lr_factor": {"above": 0},
    "momentum": {"minimum": 0},
    "weight_decay": {"minimum": 0},
    "label_smoothing": {"minimum": 0, "below": 1},
}
_FLAGS = ("nesterov", "drop_last", "sync_batch_norm", "channels_last", "deterministic")
_CHOICES = {
    "schedule": ("cosine", "step", "constant"),
    "optimizer": ("sgd", "adamw"),
    "sampling": SAMPLINGS,
    "precision": PRECISIONS,
}
_SELECTIONS = ("best_all", "last")


@dataclass(frozen=True)
class JointOptions:
    """How to train; :func:`alphaext.pretraining.train_model` says what each option means."""

    epochs: int = 90
    batch_size: int = 512
    lr: float = 0.2
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup_epochs: int = 0
    lr_step: int = 30
    lr_factor: float = 0.1
    optimizer: str = "sgd"
    sampling: str = "instance"
    label_smoothing: float = 0.0
    precision: str = "float32"
    drop_last: bool = True
    sync_batch_norm: bool = False
    channels_last: bool = True
    deterministic: bool = True
    select: str | None = None
    few_below: int = 20
    many_above: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        # Kept as Python's own numbers: checkpoints hold them, and NumPy's would make those unreadable without unpickling.
        for name, (minimum, maximum) in _INTEGERS.items():
            object.__setattr__(self, name, check_integer(getattr(self, name), name, minimum=minimum, maximum=maximum))
        for name, bounds in _NUMBERS.items():
            object.__setattr__(self, name, check_number(getattr(self, name), name, **bounds))
        for name in _FLAGS:
            check_flag(getattr(self, name), name)
        for name, choices in _CHOICES.items():
            check_choice(getattr(self, name), name, choices)
        if self.select is not None:
            check_choice(self.select, "select", _SELECTIONS)
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs={self.epochs}, got {self.warmup_epochs}")
        if self.nesterov and (self.momentum == 0 or self.optimizer != "sgd"):
            raise ValueError(
                f"nesterov needs optimizer='sgd' and a momentum above 0, got {self.optimizer!r} and momentum={self.momentum:g}"
            )
        check_thresholds(self.few_below, self.many_above)

    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate of a step (0 is the first of ``steps``) of an epoch (1 is the first)."""
        if epoch <= self.warmup_epochs:
            return self.lr * ((epoch - 1) * steps + step + 1) / (self.warmup_epochs * steps)
        done = epoch - 1 - self.warmup_epochs
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done / (self.epochs - self.warmup_epochs)))
        if self.schedule == "step":
            return self.lr * float(self.lr_factor ** (done // self.lr_step))
        return self.lr

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of these parameters, all in one group."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True,
        )
