"""Checks of data, and of a checkpoint's class order, before hours are spent: all that is wrong, in one report."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from unicodedata import normalize

import torch
from torch import Tensor, nn

from ..classes import ClassSplit, class_means, split_classes
from ..data.images import LabelledImages
from ..utils.checks import check_class_names, check_integer, check_kind, check_thresholds, if_given
from ..utils.linear import linear_parameters
from ..utils.tensors import LabelledFeatures, TensorLike, check_labels, class_ids, features_and_labels, finite_tensor
from .images import content_problems, missing_problems, read_all, reading_problems, repeat_problems, truncation_problems
from .labels import (
    coverage_problems,
    describe_class,
    find_class_folders,
    folder_problems,
    gap_problems,
    label_problems,
    name_problems,
    names_of_classes,
    split_problems,
)
from .report import LEVELS, DataReport, Finding


def check_data(
    train: LabelledImages,
    val: LabelledImages | None = None,
    test: LabelledImages | None = None,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    few_below: int = 20,
    many_above: int = 100,
    few_classes: TensorLike | None = None,
    top_k: int = 5,
    read_images: bool = True,
    workers: int | None = None,
    progress: bool | None = None,
) -> DataReport:
    """Check training, validation and test images for all that is known to spoil a run, and report every finding.

    Errors: images that are missing or cannot be read; classes without training images; labels that the classifier has no row
    for; an image in two parts, by its path or its bytes (up to one in a thousand by its bytes is a warning); splits without few
    or base classes; another order of the classes in one part than in another or in the checkpoint. Warnings: few classes
    without validation images, classes without test images, images listed twice or under two labels.

    Args:
        train: the training images.
        val: the validation images, if there are any.
        test: the test images, if there are any.
        num_classes: N, the rows of the classifier. Default: the number of ``class_names``, or what ``train`` says.
        class_names: the classes as the checkpoint orders them, where it is known.
        few_below: a class with fewer training images is few; 20 in the paper, section 4.1.
        many_above: a class with more training images is many; 100 in the paper.
        few_classes: ids of the few classes, however many images they have, instead of ``few_below``; or names.
        top_k: how many base classes each few class is to be combined with; 5 in the paper.
        read_images: read and decode every image. Without, files are only looked for, and equal images under two names go
            unnoticed.
        workers: threads that read; default, two a core that this process may use, at most 32.
        progress: show a progress bar while images are read; None shows it where standard error is a terminal.

    Returns:
        A :class:`DataReport`; it has all findings, and whether there is an error among them.

    Raises:
        TypeError, ValueError: arguments that are no images, or out of range, or that disagree; never for what is in the data.
        KeyboardInterrupt: passed on, once the threads have finished the image that they are at.

    Example:
        >>> import numpy
        >>> from alphaext.data import ArrayImages
        >>> labels = torch.arange(12).repeat_interleave(30)[:345]
        >>> pixels = numpy.arange(345 * 4, dtype=numpy.uint16).view(numpy.uint8).reshape(345, 8, 1)
        >>> report = check_data(ArrayImages(pixels, labels, "train"))
        >>> report.ok, report.split
        (True, ClassSplit(few=1, medium=11, many=0))
        >>> [finding.title for finding in report.problems]
        ['no many classes']
    """
    started = time.monotonic()
    parts = _check_parts(train, val, test)
    few_below, many_above = check_thresholds(check_integer(few_below, "few_below", minimum=1), many_above)
    top_k = check_integer(top_k, "top_k", minimum=1)
    workers = if_given(check_integer, workers, "workers", minimum=1)
    num_classes = if_given(check_integer, num_classes, "num_classes", minimum=1)
    checkpoint_names = if_given(check_class_names, class_names, num_classes)
    if num_classes is None:
        num_classes = train.num_classes if checkpoint_names is None else len(checkpoint_names)

    folders = find_class_folders(parts)
    names = names_of_classes(parts, folders, checkpoint_names, num_classes)
    counts = {
        part: images.labels[images.labels < num_classes].bincount(minlength=num_classes) for part, images in parts.items()
    }
    few = if_given(class_ids, few_classes, num_classes, "few_classes", names)
    problems = [
        *label_problems(parts, num_classes),
        *gap_problems(train, counts["train"], num_classes, names),
        *split_problems(counts["train"], few_below, many_above, top_k, few),
        *coverage_problems(counts, few_below, names, few),
        *name_problems(parts, checkpoint_names),
        *folder_problems(parts, folders, checkpoint_names),
        *repeat_problems(parts),
    ]
    if read_images:
        readings = read_all(parts, workers=workers, progress=progress)
        problems += [*reading_problems(parts, readings), *content_problems(parts, readings), *truncation_problems()]
    else:
        problems += missing_problems(parts)
    if train.noun != "image":  # findings speak of images; items are names of the user's own
        problems = [replace(each, title=_of(train, each.title), detail=_of(train, each.detail)) for each in problems]
    split = None
    if not bool((counts["train"] == 0).any()):
        split = split_classes(counts["train"], few_below=few_below, many_above=many_above)
        split = split if few is None else ClassSplit.of_few(few, counts["train"], many_above)
    return DataReport(
        counts=counts,
        images={part: len(images) for part, images in parts.items()},
        num_classes=num_classes,
        class_names=names,
        split=split,
        few_below=few_below,
        many_above=many_above,
        few_classes=few,
        problems=sorted(problems, key=lambda finding: LEVELS.index(finding.level)),
        images_read=sum(map(len, parts.values())) if read_images else 0,
        seconds=time.monotonic() - started,
        noun=train.noun,
    )


def _of(images: LabelledImages, text: str) -> str:
    return re.sub(r"\bimage", images.noun, text)


def check_classifier_order(
    classifier: nn.Module,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    *,
    class_names: Sequence[str] | None = None,
) -> Finding:
    """Check whether the rows of a classifier are in the order of the labels, by what it makes of each class's mean feature.

    A classifier assigns the mean training feature of most classes to that class. If it does so no more often than chance would,
    it counts the classes in another order than the lists, or the features are not what it was trained on.

    Args:
        classifier: a linear layer with ``weight`` [N, D] and ``bias`` [N] or None.
        features: floating point, the class means [N, D], or without means the training features [n, D] with their ``labels``
            (memory maps and float16 too).
        labels: integers [n] in ``0 .. N - 1``; None if ``features`` are class means. Classes without features are passed over.
        class_names: the names of the N classes in the order of the labels. With them, the orders that a checkpoint is likely to
            have instead are tried: sorted as text, as numbers, and without regard to case.

    Returns:
        A finding: an error if the order is wrong, a warning if it may be, else a note with the share of classes whose mean is
        assigned to them.

    Raises:
        TypeError, ValueError: shapes, dtypes or numbers of classes that disagree.

    Example:
        >>> means = torch.eye(30)
        >>> linear = nn.Linear(30, 30)
        >>> _ = linear.weight.data.copy_(means), linear.bias.data.zero_()
        >>> check_classifier_order(linear, means).level
        'note'
        >>> check_classifier_order(linear, means.roll(1, 0)).title
        'class order of checkpoint and lists differ'
    """
    weight, bias = linear_parameters(classifier)
    num_classes, width = weight.shape
    class_names = if_given(check_class_names, class_names, num_classes)
    means, classes = _means(features, labels, num_classes)
    if means.shape[1] != width:
        raise ValueError(f"features must have the classifier's {width} columns, got {means.shape[1]}")
    logits = means.float() @ weight.float().to(means.device).T
    if bias is not None:
        logits += bias.float().to(means.device)
    assigned = logits.argmax(dim=1).cpu()
    share = float((assigned == classes).double().mean())
    distinct = len(assigned.unique())
    chance = 1 / num_classes
    said = f"the classifier assigns the mean feature of {share:.1%} of the classes to that class (chance is {chance:.1%})"

    items = _assignments(assigned, classes, class_names)
    differ = "class order of checkpoint and lists differ"
    orders = {order: float((assigned == row_of[classes]).double().mean()) for order, row_of in _likely_orders(class_names)}
    best = max(orders, key=orders.__getitem__, default="")
    if orders.get(best, 0) > max(share + 0.1, 2 * share):
        return Finding(
            "error",
            differ,
            f"{said}; with the classes {best} it is {orders[best]:.1%}: the checkpoint was trained with that order, so relabel "
            "the lists in it",
            items,
        )
    if share >= 0.1:
        return Finding("note", "class order of checkpoint and lists", said)
    if share < 5 * chance:
        cause = "the order of the classes is another"
        if distinct <= 0.5 * len(assigned):
            cause += ", or the features are not those that it was trained on (another backbone, another transform)"
        return Finding("error", differ, f"{said}; the {len(assigned)} means go to {distinct} different rows: {cause}", items)
    return Finding(
        "warning",
        "class order of checkpoint and lists may differ",
        f"{said}: few classes, though more than by chance; are the features those that it was trained on?",
        items,
    )


def _means(features: TensorLike | LabelledFeatures, labels: TensorLike | None, num_classes: int) -> tuple[Tensor, Tensor]:
    """The mean feature of each class that has one, and these classes."""
    if hasattr(features, "labels"):
        features, labels = features_and_labels(features, labels)
    if labels is None:
        return finite_tensor(features, "features", (num_classes, "D")), torch.arange(num_classes, device="cpu")
    classes, places = check_labels(labels, num_classes).cpu().unique(return_inverse=True)
    if len(classes) == 0:
        raise ValueError("features must have at least one row, got none")
    device = features.device if isinstance(features, Tensor) else "cpu"
    return class_means(features, places.to(device)), classes


def _likely_orders(names: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Orders that a checkpoint may have, and the row of each of our classes in them."""
    if names is None:
        return
    orders: list[tuple[str, list[str]]] = [
        ("sorted by name", sorted(names)),
        ("sorted by name, accents apart from their letters (Unicode's NFD)", sorted(names, key=partial(normalize, "NFD"))),
        ("sorted by name, accented letters as one (Unicode's NFC)", sorted(names, key=partial(normalize, "NFC"))),
        ("sorted by name without regard to case", sorted(names, key=lambda name: (name.casefold(), name))),
    ]
    if all(name.isascii() and name.isdecimal() for name in names):
        orders.append(("sorted as numbers", sorted(names, key=lambda name: (int(name), name))))
    for order, ordered in orders:
        if ordered != list(names):
            row_of = {name: row for row, name in enumerate(ordered)}
            yield order, torch.tensor([row_of[name] for name in names], device="cpu")


def _assignments(assigned: Tensor, classes: Tensor, names: Sequence[str] | None) -> tuple[str, ...]:
    pairs = zip(classes.tolist(), assigned.tolist(), strict=True)
    return tuple(f"class {describe_class(label, names)} is taken for {row}" for label, row in pairs if label != row)


def _check_parts(train: LabelledImages, val: LabelledImages | None, test: LabelledImages | None) -> dict[str, LabelledImages]:
    parts = {"train": train, **{name: images for name, images in (("val", val), ("test", test)) if images is not None}}
    for name, images in parts.items():
        check_kind(images, LabelledImages, name, hint="alphaext.data.open_images makes them")
    return parts
