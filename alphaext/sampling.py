"""Which samples an epoch trains on: all of the few classes, and base samples drawn anew each epoch."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers the operators)
from ._checks import format_ids
from .options import TrainingOptions

__all__ = ["EpochSampler"]


class EpochSampler:
    """Draws the samples of each epoch, as a function of the seed and the epoch alone.

    Every epoch has all samples of the few classes and ``negative_ratio`` times as many base samples (1 in the paper, 0 in its
    appendix E): uniform over images, or the same number from each base class. They are drawn without replacement; where more
    are asked for than there are, with replacement, and a warning says so.

    Samples are numbered: first the few ones, then the base ones, grouped by class where that matters. ``indices[number]`` is
    the sample's place in the data.

    Attributes:
        num_few: samples of few classes.
        negatives: base samples of an epoch.
        indices: ``[n]`` int64.
    """

    def __init__(self, labels: Tensor, few_classes: Tensor, num_classes: int, options: TrainingOptions) -> None:
        few_classes = few_classes.cpu()
        counts = torch.bincount(labels, minlength=num_classes)
        missing = few_classes[counts[few_classes] == 0]
        if len(missing):
            raise ValueError(f"labels has no sample of the few classes {format_ids(missing.tolist())}")
        is_few_class = torch.zeros(num_classes, dtype=torch.bool, device="cpu")
        is_few_class[few_classes] = True
        is_few = is_few_class[labels]
        few, base = is_few.nonzero().flatten(), (~is_few).nonzero().flatten()
        self.seed = options.seed
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
        return self.num_few + self.negatives

    def draw(self, epoch: int) -> Tensor:
        """The numbers of an epoch's samples, ``[len(self)]`` int64, in the order they are trained on."""
        order: Tensor = torch.ops.alphaext.sample_epoch(self.num_few, self._group_offsets, self.negatives, self.seed, epoch)
        return order

    def used(self, epochs: range) -> Tensor:
        """Where in the data the samples are that take part in ``epochs``: ascending, each once."""
        taken = torch.zeros(len(self.indices), dtype=torch.bool, device="cpu")
        taken[: self.num_few] = True
        for epoch in epochs if self.negatives else ():
            taken[self.draw(epoch)] = True
            if bool(taken.all()):
                break
        return self.indices[taken].sort().values
