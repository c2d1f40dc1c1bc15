"""From the number of training samples of each class to the few, medium, many and base classes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .utils.checks import check_integer, check_kind, check_thresholds, format_ids, if_given
from .utils.tensors import (
    LabelledFeatures,
    TensorLike,
    as_tensor,
    check_class_ids,
    check_finite,
    check_labels,
    check_rows,
    check_same_device,
    features_and_labels,
)

# Elements of one block of features. It stays in cache between its conversion and its sum, and torch starts its threads
# from 2**15 elements on: waiting for them costs more than such light work, many times more on a busy machine.
_BLOCK_ELEMENTS = 2**15 - 1

FeatureRows: TypeAlias = npt.NDArray[Any]

_PARTS = ("few", "medium", "many", "empty")


def class_counts(labels: TensorLike, num_classes: int | None = None) -> Tensor:
    """Count the samples of each class.

    Args:
        labels: class id of each sample, integers [n] in ``0 .. num_classes - 1``; tensor, NumPy array or list.
        num_classes: N. Default: the largest label plus one. Give it where the last classes may have no sample.

    Returns:
        int64 [N], samples per class, on the device of ``labels``; a class without samples has 0.

    Raises:
        TypeError: ``labels`` are not integers.
        ValueError: a label is out of range, or there are no labels and no ``num_classes``.

    Example:
        >>> class_counts([0, 2, 2], num_classes=4)
        tensor([1, 0, 2, 0])
    """
    num_classes = if_given(check_integer, num_classes, "num_classes", minimum=1)
    class_ids = check_labels(labels, num_classes)
    if num_classes is None and class_ids.numel() == 0:
        raise ValueError("labels is empty, so the number of classes is unknown: give num_classes")
    return torch.bincount(class_ids, minlength=num_classes or 0)


@dataclass(frozen=True, eq=False, repr=False)
class ClassSplit:
    """The classes of a data set, split by how many training samples they have.

    Every class id of ``0 .. num_classes - 1`` is in one of the three, or in ``empty``. ``split_classes`` makes one from counts;
    made by hand, it takes tensors, arrays or lists of ids in any order and sorts them.

    Attributes:
        few: int64 [F], ascending; the classes whose classifiers Alpha Net repairs.
        medium: int64, ascending.
        many: int64, ascending.
        empty: int64, ascending; classes without a training sample. They are in no split and nobody's neighbours, and keep their
            rows. None by default.

    Raises:
        TypeError: ids that are not integers.
        ValueError: a class in two splits or twice in one, or nowhere; tensors on different devices.

    Example:
        >>> split = ClassSplit(few=[3], medium=[1, 2], many=[0])
        >>> split
        ClassSplit(few=1, medium=2, many=1)
        >>> split.base
        tensor([0, 1, 2])
    """

    few: Tensor
    medium: Tensor
    many: Tensor
    empty: Tensor = ()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_same_device(few=self.few, medium=self.medium, many=self.many)
        for name in _PARTS:
            ids = check_class_ids(getattr(self, name), None, name)
            object.__setattr__(self, name, ids.sort().values)
        object.__setattr__(self, "empty", self.empty.to(self.few.device))
        for first, second in itertools.combinations(_PARTS, 2):
            ids = getattr(self, first)
            shared = ids[torch.isin(ids, getattr(self, second))]
            if shared.numel():
                raise ValueError(f"{first} and {second} share the classes {format_ids(shared.tolist())}")
        present = torch.cat([self.few, self.medium, self.many, self.empty])
        if present.numel() == len(self.empty):
            raise ValueError("few, medium and many are all empty: a split needs at least one class")
        # Distinct ids from 0 on without a gap: the largest is one less than their number.
        if int(present.max()) != present.numel() - 1:
            missing = sorted(set(range(int(present.max()))) - set(present.tolist()))
            raise ValueError(
                f"few, medium and many must cover every class from 0 to {int(present.max())}, "
                f"in none of them: {format_ids(missing)}"
            )

    @classmethod
    def of_masks(cls, few: Tensor, many: Tensor, empty: Tensor) -> ClassSplit:
        """The split of bool masks ``[N]``; what is in none of them is medium, and what is few is not empty."""
        empty = empty & ~few
        return cls(*(torch.nonzero(mask)[:, 0] for mask in (few, ~(few | many | empty), many, empty)))

    @classmethod
    def of_few(cls, few_classes: TensorLike, counts: Tensor, many_above: int) -> ClassSplit:
        """The split in which these classes are few however many samples they have, and the others go by ``counts``."""
        few = torch.zeros(len(counts), dtype=torch.bool, device="cpu")
        few[check_class_ids(few_classes, len(counts), "few_classes").cpu()] = True
        return cls.of_masks(few, (counts > many_above) & ~few, counts == 0)

    def cpu(self) -> ClassSplit:
        """The same on the CPU."""
        return ClassSplit(*(getattr(self, name).cpu() for name in _PARTS))

    @property
    def base(self) -> Tensor:
        """The classes that are not few (medium and many together), int64, ascending; paper section 4.1."""
        return torch.cat([self.medium, self.many]).sort().values

    @property
    def num_classes(self) -> int:
        """N, the number of classes in all."""
        return sum(getattr(self, name).numel() for name in _PARTS)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassSplit):
            return NotImplemented
        return all(torch.equal(getattr(self, name).cpu(), getattr(other, name).cpu()) for name in _PARTS)

    # Tensors can be changed in place, so a hash by value could go stale.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [f"{name}={len(getattr(self, name))}" for name in _PARTS if name != "empty" or len(self.empty)]
        return f"ClassSplit({', '.join(shown)})"


def split_classes(counts: TensorLike, *, few_below: int = 20, many_above: int = 100) -> ClassSplit:
    """Split the classes by their number of training samples.

    Few: fewer than ``few_below`` samples. Many: more than ``many_above``. Medium: all between, both ends included, so
    that with the defaults a class of exactly 20 and one of exactly 100 are medium. With
    ``few_below = many_above + 1`` there is no medium class. A class without samples is in none of the three.

    Args:
        counts: training samples of each class, integers [N], as ``class_counts`` returns them.
        few_below: default 20, paper section 4.1.
        many_above: default 100, paper section 4.1.

    Returns:
        The split, on the device of ``counts``. Any of its parts may be empty.

    Raises:
        TypeError: ``counts`` or thresholds that are not integers.
        ValueError: a negative count, no classes at all, no samples at all, or a
            ``few_below`` so far above ``many_above`` that a class would be both few and many.

    Example:
        >>> split_classes([500, 100, 20, 19])
        ClassSplit(few=1, medium=2, many=1)
    """
    few_below, many_above = check_thresholds(few_below, many_above)
    samples = check_labels(counts, None, "counts")
    if samples.numel() == 0:
        raise ValueError("counts is empty: there are no classes to split")
    empty = samples == 0
    if bool(empty.all()):
        raise ValueError("counts must be above 0 for some class, all are 0")
    return ClassSplit.of_masks((samples < few_below) & ~empty, (samples > many_above) & ~empty, empty)


def check_split(split: ClassSplit, num_classes: int) -> ClassSplit:
    """Return ``split`` on the CPU after checking that it is one of ``num_classes`` classes."""
    check_kind(split, ClassSplit, "split", hint="split_classes makes one from counts")
    if split.num_classes != num_classes:
        raise ValueError(f"split must be of the classifier's {num_classes} classes, got one of {split.num_classes}")
    return split.cpu()


def class_means(
    features: TensorLike | LabelledFeatures, labels: TensorLike | None = None, num_classes: int | None = None
) -> Tensor:
    """Return the mean feature of each class.

    The features are read block by block, so that a memory-mapped array larger than memory will do. Sums are kept in
    float64 and added in the order of the samples.

    Args:
        features: floating point [n, D], the input of the last layer (paper section 4.2: "its mean feature from the last
            layer before fc"); tensor on any device, NumPy array or memory map.
            Or a :class:`alphaext.features.Features`, which has its labels.
        labels: class id of each sample, integers [n], where ``features`` has none.
        num_classes: N. Default: the largest label plus one.

    Returns:
        [N, D] on the device of ``features``, in their dtype but at least float32; 0 for a class without samples.

    Raises:
        TypeError: features that are not floating point, labels that are not integers.
        ValueError: NaN or infinity, labels out of range, numbers of
            samples or devices that disagree.

    Example:
        >>> class_means(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), [0, 0, 1])
        tensor([[2., 0.],
                [0., 5.]])
    """
    sums, counts, like = class_sums(features, labels, num_classes, may_be_empty=True)
    means = (torch.from_numpy(sums) / counts.clamp(min=1)[:, None]).to(like.dtype)
    check_finite(means, "the sum over a class of features")
    return means.to(like.device)


def class_sums(
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    num_classes: int | None = None,
    transform: Callable[[FeatureRows], FeatureRows] | None = None,
    *,
    may_be_empty: bool = False,
) -> tuple[npt.NDArray[np.float64], Tensor, Tensor]:
    """Return the sum of each class's features, what :func:`class_means` divides by the class's samples.

    Args:
        features: as for :func:`class_means`, as are ``labels`` and ``num_classes``.
        transform: what to sum instead of the features: float64 rows ``[block, D]`` to rows of that shape.
        may_be_empty: allow classes without samples, whose sum is 0.

    Returns:
        The sums, float64 [N, D]; the samples of each class, int64 [N]; and an empty tensor of the dtype and on the device that
        a result has: those of ``features``, but at least float32.
    """
    features, labels = features_and_labels(features, labels)
    check_same_device(features=features, labels=labels)
    # Dtype and device, without touching a memory map's data.
    source, empty = check_rows(features, "features", "D")
    samples, width = int(source.shape[0]), int(source.shape[1])
    counts = class_counts(labels, num_classes).cpu()
    label_list = as_tensor(labels, "labels").tolist()
    if len(label_list) != samples:
        raise ValueError(f"features and labels must have one entry a sample, got {samples} and {len(label_list)}")
    if not may_be_empty and bool((counts == 0).any()):
        missing = torch.nonzero(counts == 0)[:, 0].tolist()
        raise ValueError(f"labels must hold every class of 0..{counts.numel() - 1}, no samples of class {format_ids(missing)}")

    sums = np.zeros((counts.numel(), width))
    sum_rows = list(sums)
    rows = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, samples, rows):
        # Row by row: index_add_ would leave the order, and so the last bit, to the device and the number of threads.
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
            wide: FeatureRows = as_tensor(source[start : start + rows], "features").detach().cpu().double().numpy()
            summed = wide if transform is None else transform(wide)
            for label, row in zip(label_list[start : start + rows], summed, strict=True):
                sum_rows[label] += row
    # A feature that is not finite leaves no sum finite: only then are all looked at.
    for start in range(0, 0 if np.isfinite(sums).all() else samples, rows):
        check_finite(as_tensor(source[start : start + rows], "features").detach(), "features", first_row=start)
    return sums, counts, empty if empty.dtype.itemsize >= 4 else empty.float()
