"""The numbers of torch's SGD, and what its weight decay leaves of the start."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from ..ops.training import SgdNumbers
from .options import TrainingOptions


@dataclass(frozen=True)
class Sgd(SgdNumbers):
    """The numbers of ``torch.optim.SGD``."""

    @classmethod
    def of_options(cls, options: TrainingOptions) -> Sgd:
        """Those of a training's options."""
        return cls(**{entry.name: getattr(options, entry.name) for entry in fields(cls)})

    def optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.SGD:
        """The optimiser of these numbers."""
        # On a CPU, fused SGD left 16-bit parameters as they were before torch 2.14, all but the last few of each.
        fused = all(p.device.type != "cpu" or p.dtype in (torch.float32, torch.float64) for p in parameters)
        return torch.optim.SGD(parameters, **vars(self), fused=fused)

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
        return cls(**{entry.name: group[entry.name] for entry in fields(cls)})


class DecayOfStart:
    """What weight decay leaves of the parameters a training started with: the factor A in ``w(t) = A w(0) + ...``.

    SGD is linear in the parameters and the gradients it has seen, so the start's share shrinks by a factor that depends on the
    options alone (docs/reference/exactness.md).
    """

    def __init__(self, sgd: Sgd) -> None:
        self.sgd = sgd
        self.factor = 1.0
        self.momentum = 0.0
        self.steps = 0

    def advance(self, lr: float, steps: int) -> None:
        """Follow ``steps`` steps of SGD at learning rate ``lr``."""
        sgd = self.sgd
        for _ in range(steps):
            gradient = sgd.weight_decay * self.factor
            keep = 1.0 if self.steps == 0 or sgd.momentum == 0 else 1 - sgd.dampening
            self.momentum = sgd.momentum * self.momentum + keep * gradient
            self.factor -= lr * (gradient + sgd.momentum * self.momentum if sgd.nesterov else self.momentum)
            self.steps += 1
