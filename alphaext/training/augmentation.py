"""Samples that few classes might have had: their own mean, moved the way samples of near base classes lie around theirs.

A few class has too few images to say how its samples scatter, but the base classes near it have enough. A drawn sample of the
few class ``f`` is ``m_f + x_j - m_k``: ``k`` one of its nearest base classes, ``x_j`` a training sample of that class, ``m_k``
that class's mean. Of so few images ``m_f`` is itself uncertain, so it is moved toward the mean of the neighbours' means.

Drawn features are never held: each is computed from the real ones when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..head.neighbors import nearest_classes
from ..utils.checks import format_ids
from ..utils.seeds import seeded_generator

__all__ = ["DrawnFeatures", "draw_features"]

SHRINKAGE = 5.0
"""The mean of n images counts n / (n + SHRINKAGE), that of the neighbours' means the rest."""


@dataclass(frozen=True)
class DrawnFeatures:
    """Real features ``[n, D]`` and behind them drawn ones: rows of a tensor ``[n + drawn, D]``, by slice or by ids from 0 on.

    Attributes:
        real: ``[n, D]``, any floating dtype, in memory or memory-mapped.
        source: ``[drawn]`` int64, the real sample that each drawn one borrows.
        few_of: ``[drawn]`` int64, which row of ``few_means`` each drawn one belongs to.
        base_of: ``[drawn]`` int64, the class of ``source``.
        few_means: ``[F, D]``, the few classes' means, moved toward their neighbours'.
        means: ``[N, D]``, the class means.
    """

    real: Tensor
    source: Tensor
    few_of: Tensor
    base_of: Tensor
    few_means: Tensor
    means: Tensor

    def __len__(self) -> int:
        return len(self.real) + len(self.source)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.real.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.real.dtype

    def origin(self, index: Tensor) -> Tensor:
        """The real samples that some rows are, or are drawn from."""
        drawn = index.clamp(min=len(self.real)) - len(self.real)
        return torch.where(index < len(self.real), index, self.source.index_select(0, drawn))

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Some rows: in the dtype of the real features where only such are asked for, else in that of the means."""
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if end <= len(self.real):
                return self.real[begin:end:step]
            index = torch.arange(begin, end, step, device="cpu")
        is_real = index < len(self.real)
        if bool(is_real.all()):
            return self.real[index]
        drawn = index.clamp(min=len(self.real)) - len(self.real)
        rows = self.real[self.origin(index)].to(self.means.dtype)
        moved = rows + (
            self.few_means.index_select(0, self.few_of.index_select(0, drawn))
            - self.means.index_select(0, self.base_of.index_select(0, drawn))
        )
        return torch.where(is_real[:, None].to(rows.device), rows, moved)


def draw_features(
    features: Tensor, labels: Tensor, means: Tensor, few_classes: Tensor, count: int, seed: int, neighbors: int = 5
) -> tuple[DrawnFeatures, Tensor]:
    """Draw ``count`` samples for each few class.

    Args:
        features: ``[n, D]``, any floating dtype.
        labels: ``[n]`` int64, on the CPU.
        means: ``[N, D]``, the class means (:func:`alphaext.class_means`).
        few_classes: ``[F]`` int64; all other classes are base classes.
        count: drawn samples of each few class.
        seed: what a class draws is a function of the seed, its own id, and the data.
        neighbors: nearest base classes whose samples are borrowed, where there are so many.

    Returns:
        The features, and the labels ``[n + F count]``: real samples first, then those drawn, class by class.

    Raises:
        ValueError: a few class without samples, or no base class with samples.

    Example:
        >>> features, labels = torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([0, 0, 1])
        >>> drawn, labels = draw_features(features, labels, torch.tensor([[1.0], [9.0]]), torch.tensor([1]), count=2, seed=0)
        >>> bool(((drawn[3:] - drawn.few_means).abs() == 1).all()), labels
        (True, tensor([0, 0, 1, 1, 1]))
    """
    few_classes, num_classes = few_classes.cpu(), len(means)
    counts = torch.bincount(labels, minlength=num_classes)
    empty = few_classes[counts[few_classes] == 0]
    if len(empty):
        raise ValueError(f"labels has no sample of the few classes {format_ids(empty.tolist())}")
    is_base = counts > 0
    is_base[few_classes] = False
    base = is_base.nonzero().flatten()
    if not len(base):
        raise ValueError("augment='neighbors' borrows samples of base classes, and labels has none")
    means = means.to(device=features.device)
    near = nearest_classes(means.cpu(), few_classes, base, min(neighbors, len(base)))
    images = counts[few_classes].double()
    own = (images / (images + SHRINKAGE)).to(means)
    few_means = own[:, None] * means[few_classes] + (1 - own)[:, None] * means[near].mean(dim=1)

    order = labels.sort(stable=True).indices
    first = counts.cumsum(0) - counts
    source, base_of = [], []
    for few_class, candidates in zip(few_classes.tolist(), near, strict=True):
        generator = seeded_generator(seed, few_class)
        chosen = candidates[torch.randint(len(candidates), (count,), generator=generator, device="cpu")]
        # Uniform within the class: a fraction of its samples, as randint takes one bound for all.
        fraction = torch.rand(count, dtype=torch.float64, generator=generator, device="cpu")
        place = (fraction * counts[chosen]).long().minimum(counts[chosen] - 1)
        base_of.append(chosen)
        source.append(order[first[chosen] + place])
    few_of = torch.arange(len(few_classes), device="cpu").repeat_interleave(count)
    drawn = DrawnFeatures(features, torch.cat(source), few_of, torch.cat(base_of), few_means, means)
    return drawn, torch.cat([labels, few_classes.repeat_interleave(count)])
