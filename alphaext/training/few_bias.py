"""One constant on all few logits, chosen on validation features."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..classes import ClassSplit, check_split
from ..metrics.accuracy import SPLITS_AND_ALL
from ..utils.checks import check_number
from ..utils.linear import linear_parameters, make_linear, wide
from ..utils.tensors import LabelledFeatures, TensorLike, check_class_ids, check_finite, check_list
from .options import CHOOSING
from .selection import BaselineResult, Policy, Validation

# Of each sample the best few logit and its class, the best base logit and its class, and the label.
_Best: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# Of a choice among thousands of offsets, the rows that the table shows.
_TABLE_ROWS = 41


def few_bias(linear: nn.Module, few_classes: TensorLike, offset: float) -> nn.Linear:
    """Add one constant to the logits of all few classes.

    Args:
        linear: a module with ``weight`` ``[N, D]`` and ``bias`` ``[N]`` or None, such as ``nn.Linear``.
        few_classes: ids of the few classes, distinct.
        offset: what is added; :func:`choose_few_bias` chooses it.

    Returns:
        A new layer, in the dtype and on the device of ``linear``, always with a bias; all other numbers are the same bits.

    Raises:
        TypeError, ValueError: not a linear layer, ids out of range or repeated, an ``offset`` that is not finite.

    Example:
        >>> few_bias(nn.Linear(2, 3, bias=False), few_classes=[2], offset=0.5).bias.detach()
        tensor([0.0000, 0.0000, 0.5000])
    """
    offset = check_number(offset, "offset")
    weight, bias = linear_parameters(linear)
    few = check_class_ids(few_classes, len(weight), "few_classes").to(weight.device)
    moved = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if bias is None else bias.clone()
    moved[few] += offset
    return make_linear(weight, moved)


def choose_few_bias(
    linear: nn.Module,
    val_features: TensorLike | LabelledFeatures,
    val_labels: TensorLike | None,
    split: ClassSplit,
    *,
    offsets: Sequence[float] | None = None,
    select: str | None = None,
    min_all: float | None = None,
    policy: Policy | None = None,
    known: _Best | None = None,
) -> BaselineResult:
    """Choose the ``offset`` of :func:`few_bias` on validation features.

    Which samples are recognised changes only where the offset passes the gap between a sample's best base logit and its best
    few logit. So there is no grid to choose: between every two neighbouring gaps one offset is tried, which is as good as all
    that lie there, and no other constant does better on the validation samples.

    Args:
        linear: the trained classifier.
        val_features: ``[m, D]``, as for :func:`choose_tau`, as are all others.
        val_labels: ``[m]`` integers.
        split: which classes are few, medium and many.
        offsets: candidates instead of all that matter.
        select: as for :func:`choose_tau`; of equal offsets, the one nearest to 0.
        min_all: as for :func:`choose_tau`.
        policy: all of that at once.
        known: the best classes of all validation samples, where they are known.

    Returns:
        A :class:`alphaext.baselines.BaselineResult`. Of more than 41 candidates its table shows 41, evenly over their order,
        and besides them 0 and the one chosen; ``settings`` says how many there were.

    Raises:
        TypeError, ValueError: as :func:`few_bias` and :func:`choose_tau`; a split without few or without base classes.

    Example:
        >>> split = ClassSplit(few=[1], medium=[], many=[0])
        >>> choose_few_bias(nn.Linear(4, 2), torch.randn(20, 4), [0, 1] * 10, split, offsets=[0.25]).chosen
        {'offset': 0.25}
    """
    started = time.monotonic()
    weight, bias = linear_parameters(linear)
    split = check_split(split, len(weight))
    for name, ids in (("few", split.few), ("base", split.base)):
        if len(ids) == 0:
            raise ValueError(f"split must have a {name} class for a constant on the few logits to matter, got {split!r}")
    given = None if offsets is None else sorted({check_number(offset, "offsets") for offset in check_list(offsets, "offsets")})
    validation = Validation(val_features, val_labels, split, weight)
    computed = _best_of(validation, wide(weight), None if bias is None else wide(bias))
    gaps = _Gaps(validation, computed if known is None else [known])
    original = gaps.accuracies(np.zeros(1))[0]
    if policy is None:
        policy = Policy.of(select, min_all, validation.samples.labels, split.few, CHOOSING).bounded(original)
    validation.check_fit_to_choose("offset")
    candidates = gaps.offsets(_rounding(weight)) if given is None else np.array(given)
    accuracies = gaps.accuracies(candidates)
    best = policy.choose(accuracies, np.abs(candidates).tolist())
    shown = set(range(len(candidates)))
    if len(candidates) > _TABLE_ROWS:
        shown = {*np.linspace(0, len(candidates) - 1, _TABLE_ROWS).round().astype(int).tolist(), best}
        shown.add(int(np.abs(candidates).argmin()))
    offset = float(candidates[best])
    return BaselineResult(
        name="few-bias",
        linear=few_bias(linear, split.few, offset),
        chosen={"offset": offset},
        table=[{"offset": float(candidates[row]), **accuracies[row]} for row in sorted(shown)],
        policy=str(policy),
        settings={"candidates": len(candidates)},
        seconds=time.monotonic() - started,
        original=original,
    )


def _best_of(validation: Validation, weight: Tensor, bias: Tensor | None) -> Iterator[_Best]:
    split = validation.split
    few = split.few.to(weight.device)
    base = torch.ones(len(weight), dtype=torch.bool, device="cpu").index_fill(0, split.few, False).nonzero()[:, 0].to(few)
    for products, labels in validation.products(weight):
        logits = products if bias is None else products + bias
        best_few, few_ids = logits.index_select(1, few).max(dim=1)
        best_base, base_ids = logits.index_select(1, base).max(dim=1)
        yield best_few, few.index_select(0, few_ids), best_base, base.index_select(0, base_ids), labels


class _Gaps:
    """Of each validation sample, by how much its best base logit exceeds its best few logit, and what depends on that.

    With an offset on the few logits a sample's answer is its best few class where the offset is larger than the gap, and its
    best base class where it is smaller; where it is equal, the class of lower id.
    """

    def __init__(self, validation: Validation, best: Iterable[_Best]) -> None:
        split = validation.split
        # Few, medium, many, and classes without training samples, which compete as base classes do.
        part_of_class = torch.full((split.num_classes,), 3, dtype=torch.int64, device="cpu")
        part_of_class[split.few], part_of_class[split.medium], part_of_class[split.many] = 0, 1, 2
        gaps, parts, few_first, matters = [], [], [], []
        self.largest = 0.0  # logit, which rounding is measured by
        for best_few, few_ids, best_base, base_ids, labels in best:
            self.largest = max(self.largest, float(best_few.abs().max()), float(best_base.abs().max()))
            part = part_of_class.to(labels.device).index_select(0, labels)
            gaps.append((best_base.double() - best_few.double()).cpu())
            parts.append(part.cpu())
            few_first.append((few_ids < base_ids).cpu())
            # Where neither the best few nor the best base class is right, no offset makes the answer right.
            matters.append((torch.where(part == 0, few_ids, base_ids) == labels).cpu())
        gap = torch.cat(gaps)
        check_finite(gap, "the gaps between logits of val_features")
        here = torch.cat(matters)
        part_of_gap, first = torch.cat(parts)[here].numpy(), torch.cat(few_first)[here].numpy()
        self._gaps = gap[here].numpy()
        self._samples = torch.bincount(part_of_class[validation.samples.labels], minlength=4).tolist()
        # Of each part, sorted gaps: of samples that are the few class's where the offset equals the gap, and of the others.
        self._of_part = [
            [np.sort(self._gaps[(part_of_gap == number) & (first == own)]) for own in (True, False)] for number in range(4)
        ]

    def offsets(self, rounding: float) -> npt.NDArray[np.float64]:
        """0, and one offset between every two neighbouring gaps and beyond the outer ones.

        Gaps closer than ``rounding`` times the largest logit count as one, for the layer's own scores may order them otherwise.
        """
        distinct = np.unique(self._gaps)
        nearest = rounding * self.largest
        if len(distinct) == 0:
            return np.zeros(1)
        outer = max(nearest, (distinct[-1] - distinct[0]) / len(distinct)) or 1.0
        widths = np.diff(distinct)
        between = ((distinct[:-1] + distinct[1:]) / 2)[widths > nearest]
        result: npt.NDArray[np.float64] = np.unique(np.concatenate([[distinct[0] - outer, 0.0, distinct[-1] + outer], between]))
        return result

    def accuracies(self, offsets: npt.NDArray[np.float64]) -> list[dict[str, float]]:
        """Validation accuracy at each offset."""
        right = []
        for number, (few_first, base_first) in enumerate(self._of_part):
            # How many of the part's samples are answered with their best few class.
            few = np.searchsorted(few_first, offsets, side="right") + np.searchsorted(base_first, offsets, side="left")
            right.append(few if number == 0 else len(few_first) + len(base_first) - few)
        hits, samples = np.stack([*right[:3], sum(right)]), np.array([*self._samples[:3], sum(self._samples)])
        with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that is meant
            fractions = (hits / samples[:, None].astype(np.float64)).T.tolist()
        return [dict(zip(SPLITS_AND_ALL, row, strict=True)) for row in fractions]


def _rounding(weight: Tensor) -> float:
    """How far, relatively, a layer's scores may be from those computed here: sums in another order, a rounded bias."""
    return max(32 * torch.finfo(wide(weight[:0]).dtype).eps, 2 * torch.finfo(weight.dtype).eps)
