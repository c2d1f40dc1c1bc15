"""The options of a training, checked, and what follows from them: learning rates, SGD's decay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..utils.checks import check_choice, check_integer, check_number

SELECTIONS = ("best_all", "best_few", "last")
SCHEDULES = ("constant", "step", "multistep", "cosine")
NEGATIVE_SAMPLINGS = ("uniform", "class_balanced")
AUGMENTATIONS = ("neighbors",)
_LATER = {"samples_per_class", "augment", "augment_samples", "augment_neighbors", "prior_correction", "regularize", "few_bias"}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; :func:`alphaext.fit` says what each option means. The defaults are the paper's."""

    epochs: int = 80
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    lr_schedule: str = "step"
    lr_step: int = 20
    lr_factor: float = 0.1
    lr_milestones: Sequence[int] = ()
    negative_ratio: float = 1.0
    negative_sampling: str = "uniform"
    samples_per_class: int | None = None
    augment: str | None = None
    augment_samples: int = 200
    augment_neighbors: int = 5
    prior_correction: bool = False
    regularize: float = 0.0
    few_bias: bool = False
    select: str | None = None
    min_all: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # Kept as Python's own numbers: checkpoints hold them, and NumPy's would make those unreadable without unpickling.
        bounds = {"epochs": (0, 2**31), "batch_size": (1, 2**40), "seed": (0, 2**63 - 1), "lr_step": (1, 2**31)}
        for name, (minimum, maximum) in bounds.items():
            object.__setattr__(self, name, check_integer(getattr(self, name), name, minimum=minimum, maximum=maximum))
        for name in ("lr", "lr_factor"):
            object.__setattr__(self, name, check_number(getattr(self, name), name, above=0))
        for name in ("momentum", "dampening", "weight_decay", "negative_ratio", "regularize"):
            object.__setattr__(self, name, check_number(getattr(self, name), name, minimum=0))
        if self.negative_ratio > 1e6:
            raise ValueError(f"negative_ratio must be at most 1e6, got {self.negative_ratio!r}")
        for name in ("nesterov", "prior_correction", "few_bias"):
            object.__setattr__(self, name, bool(getattr(self, name)))
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov needs a momentum above 0 and no dampening, got momentum={self.momentum:g} and "
                f"dampening={self.dampening:g}"
            )
        check_choice(self.lr_schedule, "lr_schedule", SCHEDULES)
        check_choice(self.negative_sampling, "negative_sampling", NEGATIVE_SAMPLINGS)
        self._check_samples()
        self._check_milestones()
        self._check_last_lr()
        if self.select is not None:
            check_choice(self.select, "select", SELECTIONS)
        if self.min_all is not None:
            message = f"min_all must be a fraction in [0, 1], with select='best_few'; got {self.min_all!r} with {self.select!r}"
            if isinstance(self.min_all, bool) or not isinstance(self.min_all, (int, float)):
                raise TypeError(message)
            if self.select != "best_few" or not 0 <= self.min_all <= 1:
                raise ValueError(message)
            object.__setattr__(self, "min_all", float(self.min_all))

    def _check_samples(self) -> None:
        if self.regularize > 1e6:
            raise ValueError(f"regularize must be at most 1e6, got {self.regularize!r}")
        for name in ("augment_samples", "augment_neighbors"):
            object.__setattr__(self, name, check_integer(getattr(self, name), name, minimum=1, maximum=10**6))
        if self.augment is not None:
            check_choice(self.augment, "augment", AUGMENTATIONS)
        if self.samples_per_class is None:
            if self.augment is not None:
                raise ValueError(
                    f"augment={self.augment!r} needs samples_per_class: an epoch cannot have all samples that could be drawn"
                )
            return
        each = check_integer(self.samples_per_class, "samples_per_class", minimum=1, maximum=10**6)
        object.__setattr__(self, "samples_per_class", each)
        if self.negative_ratio != 1 or self.negative_sampling != "uniform":
            raise ValueError(
                "samples_per_class already says how many samples an epoch has of every class; got negative_ratio="
                f"{self.negative_ratio:g} and negative_sampling={self.negative_sampling!r} as well"
            )

    def _check_last_lr(self) -> None:
        try:
            last = self.lr * self.lr_multiplier(self.epochs)
        except OverflowError:
            last = math.inf
        if not math.isfinite(last):
            raise ValueError(f"lr_factor={self.lr_factor:g} makes the learning rate infinite within {self.epochs} epochs")

    def _check_milestones(self) -> None:
        milestones: object = self.lr_milestones
        if not isinstance(milestones, (list, tuple)):
            raise TypeError(f"lr_milestones must be a list of epochs, got {milestones!r}")
        for milestone in milestones:
            check_integer(milestone, "lr_milestones", minimum=1)
        if any(second <= first for first, second in itertools.pairwise(milestones)):
            raise ValueError(f"lr_milestones must increase, got {list(milestones)}")
        if bool(milestones) != (self.lr_schedule == "multistep"):
            raise ValueError(f"lr_milestones go with lr_schedule='multistep', got {list(milestones)} with {self.lr_schedule!r}")
        object.__setattr__(self, "lr_milestones", tuple(int(milestone) for milestone in milestones))

    def lr_multiplier(self, epoch: int) -> float:
        """What the learning rate of ``epoch`` (1 is the first) is multiplied by."""
        done = max(epoch, 1) - 1
        if self.lr_schedule == "step":
            return float(self.lr_factor ** (done // self.lr_step))
        if self.lr_schedule == "multistep":
            return float(self.lr_factor ** sum(milestone <= done for milestone in self.lr_milestones))
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done / max(self.epochs, 1)))
        return 1.0

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for one training to go on from another's checkpoint."""
        return {name: value for name, value in self.told().items() if name != "epochs" or self.lr_schedule == "cosine"}

    def told(self) -> dict[str, Any]:
        """All options, but for those that came later and are not used: checkpoints from before stay of use."""
        unused = {f.name for f in fields(self) if f.name in _LATER and getattr(self, f.name) == f.default}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in unused}


def selection_score(select: str, metrics: dict[str, float], min_all: float | None) -> float:
    """How good ``metrics`` on validation data are by the policy ``"best_all"`` or ``"best_few"``: the largest is chosen."""
    if select == "best_all":
        return metrics["all"]
    # What is below the bound comes after all others, the least bad first.
    return metrics["few"] if min_all is None or metrics["all"] >= min_all else metrics["all"] - 2
