"""From the number of training samples of each class to the few, medium, many and base classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import (
    TensorLike,
    as_tensor,
    check_class_ids,
    check_integer,
    check_integral,
    check_labels,
    check_same_device,
    check_shape,
    format_ids,
)

__all__ = ["ClassSplit", "class_counts", "split_classes"]


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
    if num_classes is not None:
        num_classes = check_integer(num_classes, "num_classes", minimum=1)
    label_ids = check_labels(labels, num_classes)
    if num_classes is None and label_ids.numel() == 0:
        raise ValueError("labels is empty, so the number of classes is unknown: give num_classes")
    return torch.bincount(label_ids, minlength=num_classes or 0)


@dataclass(frozen=True, eq=False, repr=False)
class ClassSplit:
    """The classes of a data set, split by how many training samples they have.

    Every class id of ``0 .. num_classes - 1`` is in exactly one of the three. ``split_classes`` makes one from counts;
    made by hand, it takes tensors, arrays or lists of ids in any order and sorts them.

    Attributes:
        few: int64 [F], ascending; the classes whose classifiers Alpha Net repairs.
        medium: int64, ascending.
        many: int64, ascending.

    Raises:
        TypeError: ids that are not integers.
        ValueError: a class in two splits or twice in one, or in none; tensors on different devices.

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

    def __post_init__(self) -> None:
        check_same_device(few=self.few, medium=self.medium, many=self.many)
        for name in ("few", "medium", "many"):
            ids = check_class_ids(getattr(self, name), None, name)
            object.__setattr__(self, name, ids.sort().values)
        for first, second in (("few", "medium"), ("few", "many"), ("medium", "many")):
            ids = getattr(self, first)
            shared = ids[torch.isin(ids, getattr(self, second))]
            if shared.numel():
                raise ValueError(f"{first} and {second} share the classes {format_ids(shared.tolist())}")
        present = torch.cat([self.few, self.medium, self.many])
        if present.numel() == 0:
            raise ValueError("few, medium and many are all empty: a split needs at least one class")
        # Distinct ids from 0 on without a gap: the largest is one less than their number.
        if int(present.max()) != present.numel() - 1:
            missing = sorted(set(range(int(present.max()))) - set(present.tolist()))
            raise ValueError(
                f"few, medium and many must cover every class from 0 to {int(present.max())}, "
                f"in none of them: {format_ids(missing)}"
            )

    @property
    def base(self) -> Tensor:
        """The classes that are not few (medium and many together), int64, ascending; paper section 4.1."""
        return torch.cat([self.medium, self.many]).sort().values

    @property
    def num_classes(self) -> int:
        """N, the number of classes in all."""
        return self.few.numel() + self.medium.numel() + self.many.numel()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassSplit):
            return NotImplemented
        return all(torch.equal(getattr(self, name).cpu(), getattr(other, name).cpu()) for name in ("few", "medium", "many"))

    # Tensors can be changed in place, so a hash by value could go stale.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ClassSplit(few={self.few.numel()}, medium={self.medium.numel()}, many={self.many.numel()})"


def split_classes(counts: TensorLike, *, few_below: int = 20, many_above: int = 100) -> ClassSplit:
    """Split the classes by their number of training samples.

    Few: fewer than ``few_below`` samples. Many: more than ``many_above``. Medium: all between, both ends included, so
    that with the defaults a class of exactly 20 and one of exactly 100 are medium. With
    ``few_below = many_above + 1`` there is no medium class.

    Args:
        counts: training samples of each class, integers [N], as ``class_counts`` returns them.
        few_below: default 20, paper section 4.1.
        many_above: default 100, paper section 4.1.

    Returns:
        The split, on the device of ``counts``. Any of its parts may be empty.

    Raises:
        TypeError: ``counts`` or thresholds that are not integers.
        ValueError: a class without samples (the message names it), a negative count, no classes at all, or a
            ``few_below`` so far above ``many_above`` that a class would be both few and many.

    Example:
        >>> split_classes([500, 100, 20, 19])
        ClassSplit(few=1, medium=2, many=1)
    """
    few_below = check_integer(few_below, "few_below", minimum=0)
    many_above = check_integer(many_above, "many_above", minimum=0)
    if few_below > many_above + 1:
        raise ValueError(
            f"few_below must be at most many_above + 1 = {many_above + 1}, got {few_below}: "
            f"classes of {many_above + 1} to {few_below - 1} samples would be both few and many"
        )
    samples = as_tensor(counts, "counts").detach()
    check_shape(samples, "counts", ("N",))
    if samples.numel() == 0:
        raise ValueError("counts is empty: there are no classes to split")
    check_integral(samples, "counts")
    samples = samples.to(torch.int64)
    if bool((samples < 0).any()):
        index = int(torch.nonzero(samples < 0)[0, 0])
        raise ValueError(f"counts must be at least 0, got {int(samples[index])} for class {index}")
    if bool((samples == 0).any()):
        empty = torch.nonzero(samples == 0)[:, 0].tolist()
        raise ValueError(f"counts must be at least 1 for every class, no samples in class {format_ids(empty)}")
    few, many = samples < few_below, samples > many_above
    few_ids, medium_ids, many_ids = (torch.nonzero(mask)[:, 0] for mask in (few, ~(few | many), many))
    return ClassSplit(few=few_ids, medium=medium_ids, many=many_ids)
