"""Changes of a trained classifier that need no training: tau-normalisation, logit adjustment, a constant on all few logits.

Each has one number, which a ``choose_...`` function finds on validation features. No function here takes test features.
"""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ._checks import TensorLike, as_tensor, check_class_ids, check_finite, check_integral, check_number, check_shape, format_ids
from .classes import ClassSplit, split_classes
from .modules import linear_parameters
from .selection import BaselineResult, Policy, Rescaling, Validation, check_split, make_linear, wide

__all__ = [
    "TAUS",
    "choose_few_bias",
    "choose_logit_adjustment",
    "choose_tau",
    "few_bias",
    "logit_adjusted",
    "tau_normalized",
]

TAUS = tuple(round(0.1 * step, 1) for step in range(21))
"""The taus that are tried: 0 to 2 in steps of 0.1, as Kang et al.'s code prints them."""

# Of a choice among thousands of offsets, the rows that the table shows.
_TABLE_ROWS = 41


def tau_normalized(linear: nn.Module, tau: float, *, keep_bias: bool = False) -> nn.Linear:
    """Divide each row of a classifier by its length to the power ``tau`` (Kang et al., ICLR 2020, section 4.2).

    Joint training makes the rows of frequent classes long. ``tau=0`` changes no row, ``tau=1`` makes all equally long.

    Args:
        linear: a module with ``weight`` ``[N, D]`` and ``bias`` ``[N]`` or None, such as ``nn.Linear``.
        tau: at least 0; 0.7 in their paper for ImageNet-LT. :func:`choose_tau` chooses it.
        keep_bias: keep the bias as it is. Without (default), as in their code, the result has none.

    Returns:
        A new layer, in the dtype and on the device of ``linear``.

    Raises:
        TypeError, ValueError: not a linear layer, a ``tau`` below 0, or a row of zeros, naming its class.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> _ = linear.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
        >>> tau_normalized(linear, tau=1.0).weight.detach()
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
    """
    tau = check_number(tau, "tau", minimum=0)
    weight, bias = linear_parameters(linear)
    factors = _tau_factors(weight, tau)
    return make_linear((weight.double() * factors[:, None]).to(weight), bias if keep_bias else None)


def logit_adjusted(linear: nn.Module, class_counts: TensorLike, tau: float = 1.0) -> nn.Linear:
    """Subtract ``tau`` times the log of each class's share of the training samples from its bias (Menon et al., ICLR 2021).

    Args:
        linear: a module with ``weight`` ``[N, D]`` and ``bias`` ``[N]`` or None, such as ``nn.Linear``.
        class_counts: ``[N]`` integers, training samples of each class, at least 1.
        tau: at least 0; 1 is theirs for a classifier whose softmax gives probabilities. :func:`choose_logit_adjustment`
            chooses it.

    Returns:
        A new layer, in the dtype and on the device of ``linear``, always with a bias.

    Raises:
        TypeError, ValueError: not a linear layer, a ``tau`` below 0, or a class without samples, naming it.

    Example:
        >>> linear = nn.Linear(2, 2, bias=False)
        >>> logit_adjusted(linear, [3, 1]).bias.detach()
        tensor([0.2877, 1.3863])
    """
    tau = check_number(tau, "tau", minimum=0)
    weight, bias = linear_parameters(linear)
    return make_linear(weight, _adjusted_bias(weight, bias, _log_shares(class_counts, len(weight)), tau).to(weight.dtype))


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
    offset = _check_offset(offset, "offset")
    weight, bias = linear_parameters(linear)
    few = check_class_ids(few_classes, len(weight), "few_classes").to(weight.device)
    moved = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if bias is None else bias.clone()
    moved[few] += offset
    return make_linear(weight, moved)


def choose_tau(
    linear: nn.Module,
    val_features: TensorLike,
    val_labels: TensorLike,
    split: ClassSplit,
    *,
    taus: Sequence[float] = TAUS,
    keep_bias: bool = False,
    select: str | None = None,
    min_all: float | None = None,
) -> BaselineResult:
    """Choose the ``tau`` of :func:`tau_normalized` on validation features.

    Args:
        linear: the trained classifier.
        val_features: ``[m, D]``, floating point; a tensor, an array or a memory map.
        val_labels: ``[m]`` integers.
        split: which classes are few, medium and many.
        taus: the candidates; default 0 to 2 in steps of 0.1, as Kang et al.'s code prints them (without choosing).
        keep_bias: as for :func:`tau_normalized`.
        select: ``"best_all"``, the best accuracy over all validation samples (default); ``"best_few"``, the best few accuracy
            among those whose accuracy over all is not below ``min_all`` (if none is, the best accuracy over all). Of equal
            ones, the smallest tau.
        min_all: for ``"best_few"``, a fraction of 1; None takes the classifier's own accuracy over all.

    Returns:
        A :class:`alphaext.selection.BaselineResult`. Its accuracies are those of the layer to the rounding of its scores.

    Raises:
        TypeError, ValueError: as :func:`tau_normalized`; no candidates; features and labels that do not fit or are not finite.

    Example:
        >>> split = ClassSplit(few=[1], medium=[], many=[0])
        >>> choose_tau(nn.Linear(4, 2), torch.randn(10, 4), [0, 1] * 5, split, taus=[0.5]).chosen
        {'tau': 0.5}
    """
    started = time.monotonic()
    weight, bias = linear_parameters(linear)
    validation = Validation(val_features, val_labels, split, weight)
    candidates = _check_taus(taus)
    shift = None if bias is None or not keep_bias else wide(bias)
    changes = [Rescaling(_tau_factors(weight, tau).to(wide(weight[:0]).dtype), shift) for tau in candidates]
    settings = {"keep_bias": bool(keep_bias)}
    result = _chosen_tau("tau", linear, validation, candidates, changes, settings, select, min_all, started)
    result.linear = tau_normalized(linear, result.chosen["tau"], keep_bias=keep_bias)
    return result


def choose_logit_adjustment(
    linear: nn.Module,
    class_counts: TensorLike,
    val_features: TensorLike,
    val_labels: TensorLike,
    *,
    split: ClassSplit | None = None,
    taus: Sequence[float] = TAUS,
    select: str | None = None,
    min_all: float | None = None,
) -> BaselineResult:
    """Choose the ``tau`` of :func:`logit_adjusted` on validation features.

    Args:
        linear: the trained classifier.
        class_counts: ``[N]`` integers, training samples of each class, at least 1.
        val_features: ``[m, D]``, as for :func:`choose_tau`, as are all others.
        val_labels: ``[m]`` integers.
        split: which classes are few, medium and many; default by ``class_counts``, with the paper's thresholds.
        taus: the candidates; default 0 to 2 in steps of 0.1.
        select: as for :func:`choose_tau`.
        min_all: as for :func:`choose_tau`.

    Returns:
        A :class:`alphaext.selection.BaselineResult`.

    Raises:
        TypeError, ValueError: as :func:`logit_adjusted` and :func:`choose_tau`.

    Example:
        >>> choose_logit_adjustment(nn.Linear(4, 2), [150, 5], torch.randn(10, 4), [0, 1] * 5, taus=[1]).chosen
        {'tau': 1.0}
    """
    started = time.monotonic()
    weight, bias = linear_parameters(linear)
    shares = _log_shares(class_counts, len(weight))
    if split is None:
        split = split_classes(as_tensor(class_counts, "class_counts"))
    validation = Validation(val_features, val_labels, split, weight)
    candidates = _check_taus(taus)
    dtype = wide(weight[:0]).dtype
    changes = [Rescaling(None, _adjusted_bias(weight, bias, shares, tau).to(dtype)) for tau in candidates]
    result = _chosen_tau("logit-adjustment", linear, validation, candidates, changes, {}, select, min_all, started)
    result.linear = logit_adjusted(linear, class_counts, result.chosen["tau"])
    return result


def choose_few_bias(
    linear: nn.Module,
    val_features: TensorLike,
    val_labels: TensorLike,
    split: ClassSplit,
    *,
    offsets: Sequence[float] | None = None,
    select: str | None = None,
    min_all: float | None = None,
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

    Returns:
        A :class:`alphaext.selection.BaselineResult`. Of more than 41 candidates its table shows 41, evenly over their order,
        and besides them 0 and the one chosen; ``settings`` says how many there were.

    Raises:
        TypeError, ValueError: as :func:`few_bias` and :func:`choose_tau`; a split without few or without base classes.

    Example:
        >>> split = ClassSplit(few=[1], medium=[], many=[0])
        >>> choose_few_bias(nn.Linear(4, 2), torch.randn(10, 4), [0, 1] * 5, split, offsets=[0.25]).chosen
        {'offset': 0.25}
    """
    started = time.monotonic()
    weight, bias = linear_parameters(linear)
    split = check_split(split, len(weight))
    for name, ids in (("few", split.few), ("base", split.base)):
        if len(ids) == 0:
            raise ValueError(f"split must have a {name} class for a constant on the few logits to matter, got {split!r}")
    given = None if offsets is None else sorted({_check_offset(offset, "offsets") for offset in _listed(offsets, "offsets")})
    validation = Validation(val_features, val_labels, split, weight)
    gaps = _Gaps(validation, wide(weight), None if bias is None else wide(bias))
    original = gaps.accuracies(np.zeros(1))[0]
    policy = Policy.of(select, min_all, validation, original)
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


class _Gaps:
    """Of each validation sample, by how much its best base logit exceeds its best few logit, and what depends on that.

    With an offset on the few logits a sample's answer is its best few class where the offset is larger than the gap, and its
    best base class where it is smaller; where it is equal, the class of lower id.
    """

    def __init__(self, validation: Validation, weight: Tensor, bias: Tensor | None) -> None:
        split = validation.split
        part_of_class = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
        part_of_class[split.medium], part_of_class[split.many] = 1, 2
        few, base = split.few.to(weight.device), split.base.to(weight.device)
        gaps, parts, few_first, matters = [], [], [], []
        self.largest = 0.0  # logit, which rounding is measured by
        for products, labels in validation.products(weight):
            logits = products if bias is None else products + bias
            best_few, few_ids = logits.index_select(1, few).max(dim=1)
            best_base, base_ids = logits.index_select(1, base).max(dim=1)
            few_ids, base_ids = few.index_select(0, few_ids), base.index_select(0, base_ids)
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
        self._samples = torch.bincount(part_of_class[validation.samples.labels], minlength=3).tolist()
        # Of each part, sorted gaps: of samples that are the few class's where the offset equals the gap, and of the others.
        self._of_part = [
            [np.sort(self._gaps[(part_of_gap == number) & (first == own)]) for own in (True, False)] for number in range(3)
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
        hits, samples = np.stack([*right, sum(right)]), np.array([*self._samples, sum(self._samples)])
        with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that is meant
            fractions = (hits / samples[:, None].astype(np.float64)).T.tolist()
        return [dict(zip(("few", "medium", "many", "all"), row, strict=True)) for row in fractions]


def _rounding(weight: Tensor) -> float:
    """How far, relatively, a layer's scores may be from those computed here: sums in another order, a rounded bias."""
    return max(32 * torch.finfo(wide(weight[:0]).dtype).eps, 2 * torch.finfo(weight.dtype).eps)


def _chosen_tau(
    name: str,
    linear: nn.Module,
    validation: Validation,
    taus: list[float],
    changes: list[Rescaling],
    settings: dict[str, Any],
    select: str | None,
    min_all: float | None,
    started: float,
) -> BaselineResult:
    """The result of a choice among taus, its layer still the original one."""
    weight, bias = linear_parameters(linear)
    own = Rescaling(None, None if bias is None else wide(bias))
    original, *accuracies = validation.accuracies(wide(weight), [own, *changes])
    policy = Policy.of(select, min_all, validation, original)
    best = policy.choose(accuracies, taus)
    table = [{"tau": tau, **accuracy} for tau, accuracy in zip(taus, accuracies, strict=True)]
    seconds = time.monotonic() - started
    return BaselineResult(name, make_linear(weight, bias), {"tau": taus[best]}, table, str(policy), settings, seconds, original)


def _tau_factors(weight: Tensor, tau: float) -> Tensor:
    """What tau-normalisation multiplies each row by, float64 ``[N]``."""
    lengths = torch.linalg.vector_norm(weight.double(), dim=1)
    zero = torch.nonzero(lengths == 0)[:, 0].tolist()
    if zero:
        raise ValueError(
            f"linear must have no row of zeros, which has no direction to normalise; got one for class {format_ids(zero)}"
        )
    return lengths**-tau


def _log_shares(class_counts: TensorLike, num_classes: int) -> Tensor:
    """The log of each class's share of the samples, float64 ``[N]`` on the CPU."""
    counts = as_tensor(class_counts, "class_counts").detach().cpu()
    check_shape(counts, "class_counts", (num_classes,))
    check_integral(counts, "class_counts")
    empty = torch.nonzero(counts < 1)[:, 0].tolist()
    if empty:
        raise ValueError(f"class_counts must be at least 1 for every class, got fewer for class {format_ids(empty)}")
    return (counts.double() / int(counts.sum())).log()


def _adjusted_bias(weight: Tensor, bias: Tensor | None, log_shares: Tensor, tau: float) -> Tensor:
    """The bias of a logit-adjusted classifier, float64 ``[N]`` where ``weight`` is."""
    adjustment = -tau * log_shares.to(weight.device)
    return adjustment if bias is None else bias.double() + adjustment


def _check_taus(taus: Sequence[float]) -> list[float]:
    return sorted({check_number(tau, "taus", minimum=0) for tau in _listed(taus, "taus")})


def _check_offset(offset: object, name: str) -> float:
    message = f"{name} must be finite, got {offset!r}"
    if isinstance(offset, bool) or not isinstance(offset, numbers.Real):
        raise TypeError(message)
    if not math.isfinite(offset):
        raise ValueError(message)
    return float(offset)


def _listed(values: Sequence[float], name: str) -> list[float]:
    if not isinstance(values, (list, tuple, range, np.ndarray)):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    if len(values) == 0:
        raise ValueError(f"{name} is empty: there is nothing to choose from")
    return list(values)
