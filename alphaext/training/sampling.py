"""Which samples an epoch trains on: all of the few classes and base samples drawn anew, or equally many of every class."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ..ops.training import sample_epoch
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
        is_few_class = torch.zeros(num_classes, dtype=torch.bool, device="cpu")
        is_few_class[few_classes] = True
        is_few = is_few_class[labels]
        few, base = is_few.nonzero().flatten(), (~is_few).nonzero().flatten()
        few = few[few >= first_few]
        self.seed, self._few_classes = options.seed, few_classes
        no_base = not len(base) or round(options.negative_ratio * len(few)) == 0
        if options.prior_correction and options.samples_per_class is None and no_base:
            raise ValueError(
                "prior_correction needs base samples to know how often an epoch has them, got negative_ratio="
                f"{options.negative_ratio:g} with {len(few)} few and {len(base)} base samples"
            )
        self.samples_per_class = options.samples_per_class
        if self.samples_per_class is not None:
            self._group_by_class(labels, few, base, num_classes)
            return
        self.num_few = len(few)
        self.negatives = round(options.negative_ratio * len(few))
        self.balanced = options.negative_sampling == "class_balanced"
        if self.negatives and not len(base):
            raise ValueError(
                f"labels has no sample of a base class, but negative_ratio={options.negative_ratio:g} asks for {self.negatives}"
            )
        if self.balanced:
            base = base[labels[base].sort(stable=True).indices]
            sizes = counts[~is_few_class]
            sizes = sizes[sizes > 0]
        else:
            sizes = torch.tensor([len(base)] if len(base) else [], dtype=torch.int64, device="cpu")
        self._group_offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        self._warn_of_replacement(sizes, options.negative_ratio)
        self.indices = torch.cat([few, base])
        if self.balanced:
            shares = torch.where(is_few_class, counts, (counts > 0).to(counts.dtype))
            self._set_prior(shares, self.negatives / max(len(sizes), 1))
        else:
            self._set_prior(counts, self.negatives / max(len(base), 1))

    def _group_by_class(self, labels: Tensor, few: Tensor, base: Tensor, num_classes: int) -> None:
        if not len(base):
            raise ValueError("labels has no sample of a base class, but samples_per_class asks for some of every class")
        assert self.samples_per_class is not None
        few, base = (part[labels[part].sort(stable=True).indices] for part in (few, base))
        self.num_few, self.balanced = len(few), True
        groups = [labels[part].unique_consecutive(return_counts=True) for part in (few, base)]
        sizes = torch.cat([counts for _, counts in groups])
        self._classes = torch.cat([classes for classes, _ in groups])
        self.negatives = self.samples_per_class * len(groups[1][0])
        self._group_offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        self.indices = torch.cat([few, base])
        self._set_prior(torch.bincount(self._classes, minlength=num_classes), 1.0)

    def _warn_of_replacement(self, sizes: Tensor, ratio: float) -> None:
        if not self.negatives:
            return
        short = int((sizes < -(-self.negatives // len(sizes))).sum())
        if not short:
            return
        if self.balanced:
            text = f"negative_ratio={ratio:g}, class-balanced, asks {short} base classes for more samples than they have"
        else:
            text = f"negative_ratio={ratio:g} asks for {self.negatives} base samples an epoch, but there are {int(sizes[0])}"
        warnings.warn(f"{text}: they are drawn with replacement", stacklevel=4)

    def __len__(self) -> int:
        """Samples of an epoch."""
        if self.samples_per_class is not None:
            return self.samples_per_class * len(self._classes)
        return self.num_few + self.negatives

    def _set_prior(self, shares: Tensor, base_rate: float) -> None:
        self.log_prior = shares.double().log()
        if base_rate > 0:
            self.log_prior[self._few_classes] -= math.log(base_rate)

    def draw(self, epoch: int) -> Tensor:
        """The numbers of an epoch's samples, ``[len(self)]`` int64, in the order they are trained on."""
        # Where every class is drawn from, few samples are no different from base ones.
        whole, drawn = (0, len(self)) if self.samples_per_class is not None else (self.num_few, self.negatives)
        return sample_epoch(whole, self._group_offsets, drawn, self.seed, epoch)

    def used(self, epochs: range) -> Tensor:
        """Where in the data the samples are that take part in ``epochs``: ascending, each once."""
        taken = torch.zeros(len(self.indices), dtype=torch.bool, device="cpu")
        taken[: self.num_few] = True
        for epoch in epochs if self.negatives else ():
            taken[self.draw(epoch)] = True
            if bool(taken.all()):
                break
        return self.indices[taken].sort().values
