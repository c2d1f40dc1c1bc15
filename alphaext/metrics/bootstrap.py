"""Percentile bootstrap of the sixteen accuracies, and of their differences between two classifiers, from hits per class.

Test images are resampled within their class: benchmarks fix how many test images a class has, so another test set like this one
has the same numbers, and only which images they are is left to chance. Then hits per class are all that matters, and a resample
costs a few numbers a class, however many samples there are.

Of ``n`` images of a class ``n - 1`` are drawn, and their share of hits taken for the class's: resampling ``n`` would give
``1 - 1/n`` of the variance, which is two thirds with the three test images that a class has on iNaturalist 2018 (J. N. K. Rao
and C. F. J. Wu, "Resampling inference with complex survey data", 1988). A class with a single image tells nothing of its
variance: it borrows that of all such classes of its part of the split, which is rather too much than too little.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..classes import ClassSplit
from .accuracy import SplitMetrics

# Hits that are drawn at a time. The draws depend on it: another value, other bits.
_BLOCK_ELEMENTS = 1 << 22


def bootstrap_percentiles(
    split: ClassSplit,
    counts: Tensor,
    gained: Tensor,
    lost: Tensor | None,
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Return an interval for each of the sixteen accuracies of ``gained - lost``.

    Args:
        split: on the CPU.
        counts: int64 [N], test samples of each class.
        gained: int64 [2, N], of each class the samples that count 1: ranked first, and among the first five.
        lost: int64 [2, N], other samples of the class, that count -1; None for none. Those left count 0.
        resamples: how many test sets are drawn.
        confidence: of the intervals.
        seed: of the draws.

    Returns:
        (low, high), fractions, under the names of :class:`alphaext.metrics.accuracy.SplitMetrics`; NaN for a part
        without samples.

    Example:
        >>> split = ClassSplit(few=[1], medium=[], many=[0])
        >>> hits = torch.tensor([[40, 5], [50, 10]])
        >>> found = bootstrap_percentiles(
        ...     split, torch.tensor([50, 10]), hits, None, resamples=500, confidence=0.9, seed=0
        ... )
        >>> found["few"][0] < 0.5 < found["few"][1], found["many_top5"]
        (True, (1.0, 1.0))
    """
    metrics = SplitMetrics(split, counts)
    samples = counts.numpy()
    draws = [
        _ClassDraws(split, samples, plus.numpy(), None if minus is None else minus.numpy())
        for plus, minus in zip(gained, (None, None) if lost is None else lost, strict=True)
    ]
    generator = np.random.Generator(np.random.PCG64(seed))
    found: list[dict[str, float]] = []
    rows = max(1, _BLOCK_ELEMENTS // len(samples))
    for start in range(0, resamples, rows):
        block = np.stack([draw.hits(generator, min(rows, resamples - start)) for draw in draws], axis=1)
        found += [metrics.of(torch.from_numpy(hits)) for hits in block]
    tail = (1 - confidence) / 2
    values = np.array([list(accuracies.values()) for accuracies in found])
    low, high = np.quantile(values, [tail, 1 - tail], axis=0).tolist()
    return dict(zip(found[0], zip(low, high, strict=True), strict=True))


class _ClassDraws:
    """Draws how many of each class's samples count 1, less those that count -1."""

    def __init__(
        self,
        split: ClassSplit,
        samples: npt.NDArray[np.int64],
        plus: npt.NDArray[np.int64],
        minus: npt.NDArray[np.int64] | None,
    ) -> None:
        self._size = len(samples)
        drawn = np.where(samples > 1, samples - 1, samples)
        shares = np.stack([plus, np.zeros_like(plus) if minus is None else minus], axis=1) / np.maximum(samples, 1)[:, None]
        for ids in (split.few, split.medium, split.many, split.empty):
            single = ids.numpy()[samples[ids.numpy()] == 1]
            if len(single):
                shares[single] = shares[single].mean(axis=0)
        # Classes with equal numbers are drawn together, which is much faster: NumPy prepares for one distribution at a time.
        kinds, kind_of_class = np.unique(np.column_stack([drawn, shares]), axis=0, return_inverse=True)
        order = np.argsort(kind_of_class.reshape(-1), kind="stable")
        bounds = np.searchsorted(kind_of_class.reshape(-1)[order], np.arange(len(kinds) + 1)).tolist()
        self._groups: list[tuple[npt.NDArray[np.int64], int, float, float, float]] = []
        for kind, (number, first, second) in enumerate(kinds.tolist()):
            if number > 0 and (first > 0 or second > 0):
                ids_of_kind = order[bounds[kind] : bounds[kind + 1]]
                of_rest = min(1.0, second / (1 - first)) if first < 1 else 0.0
                # A resample of all samples, of which only these were drawn.
                factor = float(samples[ids_of_kind[0]]) / number
                self._groups.append((ids_of_kind, int(number), first, of_rest, factor))

    def hits(self, generator: np.random.Generator, resamples: int) -> npt.NDArray[np.float64]:
        """Draw ``[resamples, N]``."""
        result: npt.NDArray[np.float64] = np.zeros((resamples, self._size))
        for ids, number, first, of_rest, factor in self._groups:
            drawn: npt.NDArray[Any] = generator.binomial(number, first, size=(resamples, len(ids)))
            if of_rest > 0:
                drawn = drawn - generator.binomial(number - drawn, of_rest)
            result[:, ids] = drawn * factor
        return result
