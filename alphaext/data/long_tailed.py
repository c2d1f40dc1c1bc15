"""Long-tailed cuts of balanced data sets, by the exponential profile that the field uses."""

from __future__ import annotations

import torch

from ..utils.checks import check_integer, check_kind, check_number
from ..utils.tensors import first_true
from .images import LabelledImages


def long_tailed_counts(most: int, num_classes: int, imbalance_factor: float) -> list[int]:
    """How many images each class keeps: ``int(most * (1 / imbalance_factor) ** (i / (num_classes - 1)))`` for class i.

    The exponential profile of Cui et al. (CVPR 2019) and Cao et al. (NeurIPS 2019).

    Args:
        most: images of the first class, the largest.
        num_classes: N.
        imbalance_factor: images of the first class for each of the last, at least 1; 100, 50 and 10 are common.

    Returns:
        N counts, falling.

    Raises:
        TypeError: arguments that are not numbers.
        ValueError: arguments out of range, or so large an ``imbalance_factor`` that the last class would have no image.

    Example:
        >>> long_tailed_counts(500, 5, 100)
        [500, 158, 50, 15, 5]
    """
    most = check_integer(most, "most", minimum=1)
    num_classes = check_integer(num_classes, "num_classes", minimum=1)
    factor = check_number(imbalance_factor, "imbalance_factor", minimum=1)
    if num_classes == 1:
        return [most]
    counts = [int(most * (1 / factor) ** (i / (num_classes - 1))) for i in range(num_classes)]
    if counts[-1] < 1:
        raise ValueError(f"imbalance_factor must be at most most = {most}, else the last class has no image, got {factor:g}")
    return counts


def make_long_tailed(
    images: LabelledImages, imbalance_factor: float, *, seed: int | None = None, most: int | None = None
) -> LabelledImages:
    """Cut a balanced data set down to a long-tailed one; see :func:`long_tailed_counts`.

    Args:
        images: what to cut, with images of every class.
        imbalance_factor: images of the largest class for each of the smallest, at least 1.
        seed: None, the field's convention: class 0 keeps most, the last class least, and each keeps its first images. A number:
            which class is how large and which images stay is drawn from it.
        most: images of the largest class. Default: as many as the smallest class of ``images`` has, which in a balanced data
            set is every class.

    Returns:
        The images that stay, in the order they were in; as many classes as before.

    Raises:
        TypeError: arguments of other types.
        ValueError: arguments out of range, a class without images, or one with fewer than it is to keep.

    Example:
        >>> import numpy
        >>> from alphaext.data import ArrayImages
        >>> images = ArrayImages(numpy.zeros((300, 8, 8), numpy.uint8), torch.arange(300) % 3, "digits")
        >>> make_long_tailed(images, 10).labels.bincount()
        tensor([100,  31,  10])
    """
    check_kind(images, LabelledImages, "images")
    available = torch.bincount(images.labels, minlength=images.num_classes)
    if int(available.min()) == 0:
        raise ValueError(f"images must have images of every class, got none of class {int(available.argmin())}")
    largest = int(available.min()) if most is None else most
    counts = torch.tensor(long_tailed_counts(largest, images.num_classes, imbalance_factor), device="cpu")
    order = torch.arange(len(images), device="cpu")
    if seed is not None:
        generator = torch.Generator(device="cpu").manual_seed(check_integer(seed, "seed", minimum=0))
        counts = counts[torch.randperm(images.num_classes, generator=generator, device="cpu")]
        order = torch.randperm(len(images), generator=generator, device="cpu")
    if (label := first_true(available < counts)) is not None:
        raise ValueError(f"images must have {int(counts[label])} images of class {label} to keep, got {int(available[label])}")
    # Images by class, within a class in `order`; each then stays if its place among its class is below the class's count.
    by_class = order[images.labels[order].argsort(stable=True)]
    labels = images.labels[by_class]
    place = torch.arange(len(images), device="cpu") - (available.cumsum(0) - available)[labels]
    return images.subset(by_class[place < counts[labels]].sort().values)
