"""The numbers of torch's SGD, and what its weight decay leaves of the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sgd:
    """The numbers of ``torch.optim.SGD``."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> Sgd | None:
        """The numbers of a plain, fresh SGD over one group of parameters; None for every other optimiser."""
        if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
            return None
        group = optimizer.param_groups[0]
        if group["maximize"] or isinstance(group["lr"], torch.Tensor) or optimizer.state:
            return None
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return None
        return cls._of_group(group)

    @classmethod
    def of_parameter(cls, optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> Sgd | None:
        """The numbers with which a SGD, subclasses too, trains ``parameter``; None for every other optimiser."""
        if not isinstance(optimizer, torch.optim.SGD):
            return None
        groups = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
        return cls._of_group(groups[0]) if groups else None

    @classmethod
    def _of_group(cls, group: dict[str, Any]) -> Sgd:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
        return cls(**{name: group[name] for name in names})


class DecayOfStart:
    """What weight decay leaves of the parameters a training started with: the factor A in ``w(t) = A w(0) + ...``.

    SGD is linear in the parameters and the gradients it has seen, so the start's share shrinks by a factor that depends on the
    options alone (docs/exactness.md).
    """

    def __init__(self, sgd: Sgd) -> None:
        self.sgd = sgd
        self.factor = 1.0
        self.momentum = 0.0
        self.steps = 0

    def advance(self, lr: float, steps: int) -> None:
        """Follow ``steps`` steps of SGD at learning rate ``lr``."""
        sgd = self.sgd
        if sgd.weight_decay == 0:
            self.steps += steps
            return
        for _ in range(steps):
            gradient = sgd.weight_decay * self.factor
            keep = 1.0 if self.steps == 0 or sgd.momentum == 0 else 1 - sgd.dampening
            self.momentum = sgd.momentum * self.momentum + keep * gradient
            self.factor -= lr * (gradient + sgd.momentum * self.momentum if sgd.nesterov else self.momentum)
            self.steps += 1
