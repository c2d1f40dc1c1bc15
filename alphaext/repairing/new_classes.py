"""Rows for classes that a classifier has never seen, from a few samples of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..classes import ClassSplit, class_counts, class_means
from ..head.neighbors import nearest_classes
from ..utils.checks import format_ids
from ..utils.linear import linear_parameters, make_linear
from ..utils.tensors import (
    LabelledFeatures,
    TensorLike,
    as_tensor,
    check_floating,
    check_labels,
    check_not_meta,
    check_shape,
    check_whole,
    features_and_labels,
)
from .preset import Repair
from .repair import repair

__all__ = ["add_classes"]

# The row that a new class starts from is a guess: it holds the training back less than a trained row does.
_REGULARIZE = 0.003
_TOP_K = 5


def add_classes(
    linear: nn.Module,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    new_features: TensorLike | LabelledFeatures | None = None,
    new_labels: TensorLike | None = None,
    *,
    progress: bool | None = None,
    **options: Any,
) -> Repair:
    """Give a trained classifier rows for classes that it has never seen; its own rows stay as they are, to the bit.

    A new row starts as the mean of the rows of the 5 classes whose mean features are nearest. Then the new rows are trained as
    preset ``"few"`` trains few rows: on samples drawn for them, beside equally many of every old class.

    Args:
        linear: the trained classifier of N classes, such as ``nn.Linear``, in float32 or float64; it is not changed.
        features: ``[n, D]``, training features of its classes, or some for each; or :class:`alphaext.features.Features`.
        labels: ``[n]`` integers from 0 to N - 1.
        new_features: ``[m, D]``, features of the new classes: one sample of each or more.
        new_labels: ``[m]`` integers from N on, each number up to the largest at least once.
        progress: show a progress bar; None shows it where standard error is a terminal.
        options: any of a configuration of :func:`alphaext.fit_many`, in place of preset few's; ``regularize`` is 0.003.

    Returns:
        A :class:`alphaext.Repair`: ``linear`` has the old rows and then the new ones, and the new classes are the few ones of
        ``head`` and ``split``.

    Raises:
        TypeError, ValueError: arguments of another type or shape, labels out of range, a new class without samples.
        FloatingPointError: the training diverged.

    Example:
        >>> original = nn.Linear(8, 3)
        >>> features, labels = torch.randn(90, 8), torch.arange(3).repeat_interleave(30)
        >>> made = add_classes(original, features, labels, torch.randn(4, 8), [3, 3, 4, 4], epochs=2)
        >>> made.linear.weight.shape, torch.equal(made.linear.weight[:3], original.weight), made.split.few
        (torch.Size([5, 8]), True, tensor([3, 4]))
    """
    weight, bias = linear_parameters(linear)
    features, labels = features_and_labels(features, labels)
    new_features, new_labels = features_and_labels(new_features, new_labels, "new_features", "new_labels")
    for each in (features, new_features):
        check_whole(each)
    old, new = as_tensor(features, "features"), as_tensor(new_features, "new_features")
    for name, values in (("features", old), ("new_features", new)):
        check_shape(values, name, ("n", weight.shape[1]))
        check_floating(values, name)
        check_not_meta(values, name)
    new = new.to(old)
    old_labels = check_labels(labels, len(weight))
    ids, first = check_labels(new_labels, None, "new_labels").cpu(), len(weight)
    if len(ids) != len(new) or len(old_labels) != len(old):
        raise ValueError("labels and new_labels must have one entry for each row of features and new_features")
    last = max(ids.tolist(), default=first)
    missing = sorted({*range(first, last + 1)} - set(ids.tolist()))
    if missing or int(ids.min()) < first:
        raise ValueError(
            f"new_labels must be integers from {first}, the number of classes, on, each up to the largest at least once; "
            + (f"there is no {format_ids(missing)}" if missing else f"got {int(ids.min())}")
        )
    joined, joined_labels = torch.cat([old, new]), torch.cat([old_labels.cpu(), ids])
    counts = class_counts(joined_labels, last + 1)
    seen = counts > 0
    few, base = torch.arange(first, last + 1, device="cpu"), seen[:first].nonzero().flatten()
    split = ClassSplit(few=few, medium=base, many=few[:0], empty=(~seen).nonzero().flatten())
    if not len(base):
        raise ValueError("labels must have samples of the classifier's classes, got none")
    near = nearest_classes(class_means(joined, joined_labels, last + 1), few, base, min(_TOP_K, len(base))).to(weight.device)
    biases = None if bias is None else torch.cat([bias, bias[near].mean(dim=1)])
    extended = make_linear(torch.cat([weight, weight[near].mean(dim=1)]), biases)
    given = {"regularize": _REGULARIZE} | options
    return repair(extended, joined, joined_labels, split=split, progress=progress, **given)
