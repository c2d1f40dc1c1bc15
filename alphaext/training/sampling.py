"""Which samples an epoch trains on: all of the few classes and base samples drawn anew, or equally many of every class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.training import sample_epoch
from ..utils.callers import warn_caller
from ..utils.checks import format_ids
from .options import TrainingOptions

__all__ = ["EpochSampler"]


class EpochSampler:
    """Draws the samples of each epoch, as a function of the seed and the epoch alone.

    Every epoch has all samples of the few classes and ``negative_ratio`` times as many base samples (1 in the paper, 0 in its
    appendix E): uniform over images, or the same number from each base class. They are drawn without replacement; where more
    are asked for than there are, with replacement, and a warning says so. Or, with ``samples_per_class``, an epoch has so many
    of every class, few classes too, with replacement where a class has fewer.

    Samples are numbered: first the few ones, then the base ones, grouped by class where that matters. ``indices[number]`` is
    the sample's place in the data.

    Attributes:
        num_few: samples of few classes that there are.
        negatives: base samples of an epoch.
        indices: ``[n]`` int64.
        log_prior: ``[N]`` float64, the log of how many samples of each class an epoch has on average, less a constant, which
            is such that base classes have the same numbers whatever the ``negative_ratio``.
    """

    def __init__(
        self, labels: Tensor, few_classes: Tensor, num_classes: int, options: TrainingOptions, first_few: int = 0
    ) -> None:
        """Few samples before the place ``first_few`` take no part: drawn ones stand in for them."""
        few_classes = few_classes.cpu()
        counts = torch.bincount(labels, minlength=num_classes)
        missing = few_classes[counts[few_classes] == 0]
        if len(missing):
            raise ValueError(f"labels has no sample of the few classes {format_ids(missing.tolist())}")
        is_few = torch.isin(labels, few_classes)
        few, base = is_few.nonzero().flatten(), (~is_few).nonzero().flatten()
        few = few[few >= first_few]
        self.seed, self.num_few, ratio = options.seed, len(few), options.negative_ratio
        every_class = options.samples_per_class is not None
        by_class = every_class or options.negative_sampling == "class_balanced"
        self.negatives = round(ratio * len(few))
        if every_class and not len(base):
            raise ValueError("labels has no sample of a base class, but samples_per_class asks for some of every class")
        if not every_class and options.prior_correction and not (len(base) and self.negatives):
            raise ValueError(
                "prior_correction needs base samples to know how often an epoch has them, got negative_ratio="
                f"{ratio:g} with {len(few)} few and {len(base)} base samples"
            )
        if self.negatives and not len(base):
            raise ValueError(f"labels has no sample of a base class, but negative_ratio={ratio:g} asks for {self.negatives}")
        # What an epoch draws from: all base samples, or those of each base class, or those of each class.
        groups = [base] if len(base) else []
        if by_class:
            groups = _by_class(labels, base)
        if options.samples_per_class is not None:
            self.negatives = options.samples_per_class * len(groups)
            groups = [*_by_class(labels, few), *groups]
        sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64, device="cpu")
        self.indices = torch.cat([*([] if every_class else [few]), *groups])
        self._group_offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        # Where every class is drawn from, few samples are no different from base ones.
        self._whole = 0 if every_class else len(few)
        self._drawn = self.negatives if options.samples_per_class is None else options.samples_per_class * len(groups)
        if self.negatives and not every_class:
            self._warn_of_replacement(sizes, ratio, by_class)
        shares = (counts > 0).long() if by_class else counts.clone()
        if not every_class:
            shares[few_classes] = counts[few_classes]
        self.log_prior = shares.double().log()
        base_rate = 1.0 if every_class else self.negatives / max(len(groups) if by_class else len(base), 1)
        if base_rate > 0:
            self.log_prior[few_classes] -= math.log(base_rate)

    def _warn_of_replacement(self, sizes: Tensor, ratio: float, balanced: bool) -> None:
        short = int((sizes < -(-self.negatives // len(sizes))).sum())
        if not short:
            return
        if balanced:
            text = f"negative_ratio={ratio:g}, class-balanced, asks {short} base classes for more samples than they have"
        else:
            text = f"negative_ratio={ratio:g} asks for {self.negatives} base samples an epoch, but there are {int(sizes[0])}"
        warn_caller(f"{text}: they are drawn with replacement")

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self._whole + self._drawn

    def draw(self, epoch: int) -> Tensor:
        """The numbers of an epoch's samples, ``[len(self)]`` int64, in the order they are trained on."""
        return sample_epoch(self._whole, self._group_offsets, self._drawn, self.seed, epoch)

    def used(self, epochs: range) -> Tensor:
        """Where in the data the samples are that take part in ``epochs``: ascending, each once."""
        taken = torch.zeros(len(self.indices), dtype=torch.bool, device="cpu")
        taken[: self.num_few] = True
        for epoch in epochs if self.negatives else ():
            taken[self.draw(epoch)] = True
            if bool(taken.all()):
                break
        return self.indices[taken].sort().values


def _by_class(labels: Tensor, samples: Tensor) -> list[Tensor]:
    """The samples of each class that has some, in the order of the classes."""
    samples = samples[labels[samples].sort(stable=True).indices]
    return list(samples.split(labels[samples].unique_consecutive(return_counts=True)[1].tolist()))
