"""The nearest class mean classifier as a linear layer (Kang et al., ICLR 2020, section 4.2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..classes import FeatureRows, class_sums
from ..utils.checks import check_choice, format_ids
from ..utils.linear import make_linear
from ..utils.tensors import LabelledFeatures, TensorLike, as_tensor, check_finite, features_and_labels

__all__ = ["NCM_METRICS", "ncm"]

NCM_METRICS = ("cosine", "euclidean")


def ncm(
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    num_classes: int | None = None,
    *,
    metric: str = "cosine",
    center: bool = False,
    normalize: bool = False,
) -> nn.Linear:
    """Return the nearest class mean classifier as a linear layer: its largest score is the class whose mean is nearest.

    Kang et al. search "either using cosine similarity or the Euclidean distance computed on L2 normalized mean features": both
    are ``metric="cosine"`` here, whose rows are the means at length 1; how long a sample's features are does not change which
    score is largest. Their code by default takes features less their mean over all samples, each at length 1, and the Euclidean
    distance to their class means: how much the means' lengths weigh then depends on the sample's own, which no linear layer can
    do. ``center=True, normalize=True`` is that but for these lengths: the means are made equally long too.

    Args:
        features: ``[n, D]``, floating point, the training features; read block by block, so a memory map will do.
            Or :class:`alphaext.features.Features`, which have their labels.
        labels: ``[n]`` integers; every class must have a sample.
        num_classes: N. Default: the largest label plus one.
        metric: ``"cosine"`` (default), or ``"euclidean"``: rows are the means, the bias is minus half their squared length.
        center: measure angles from the mean over all samples, not from 0; with ``"cosine"`` (distances do not depend on it).
        normalize: take the means of features that are made equally long first (after ``center``); with ``"cosine"``. A sample
            without any length counts as zero.

    Returns:
        The layer, on the device of ``features``, in their dtype but at least float32; with a bias where it has one to add.

    Raises:
        TypeError: features that are not floating point, labels that are not integers.
        ValueError: a class without samples or, for ``"cosine"``, with a mean of zero (the message names it); features that are
            not finite; ``center`` or ``normalize`` with ``"euclidean"``.

    Example:
        >>> features = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0]])
        >>> ncm(features, [0, 0, 1]).weight.detach()
        tensor([[1., 0.],
                [0., 1.]])
        >>> ncm(features, [0, 0, 1], metric="euclidean").bias.detach()
        tensor([-4.5000, -0.5000])
    """
    check_choice(metric, "metric", NCM_METRICS)
    if metric == "euclidean" and (center or normalize):
        raise ValueError(
            f"center and normalize go with metric='cosine', got center={center!r} and normalize={normalize!r}: distances do "
            "not depend on the first, and with the second no linear layer gives them"
        )
    features, labels = features_and_labels(features, labels)
    sums, counts, like = class_sums(features, labels, num_classes)
    origin = sums.sum(axis=0) / len(as_tensor(labels, "labels")) if center else np.zeros(sums.shape[1])
    if normalize:
        sums, _, _ = class_sums(features, labels, num_classes, lambda rows: _at_length_one(rows - origin))
    means = sums / counts.numpy()[:, None]
    if not np.isfinite(means).all():
        check_finite(torch.from_numpy(means), "the sum over a class of features")
    if metric == "euclidean":
        return _layer(means, -np.square(means).sum(axis=1) / 2, like)
    if center and not normalize:
        means = means - origin
    zero = np.flatnonzero((means == 0).all(axis=1)).tolist()
    if zero:
        raise ValueError(
            f"features must have a mean other than {'that over all samples' if center else 'zero'} in each class for "
            f"metric='cosine', which measures its direction; they have not in class {format_ids(zero)}"
        )
    weight = _at_length_one(means)
    return _layer(weight, -weight @ origin if center else None, like)


def _at_length_one(rows: FeatureRows) -> FeatureRows:
    """The rows divided by their lengths; a row of zeros stays as it is."""
    # First by the largest number, so that no square overflows or vanishes.
    largest = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1.0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


def _layer(weight: npt.NDArray[np.float64], bias: npt.NDArray[np.float64] | None, like: Tensor) -> nn.Linear:
    return make_linear(torch.from_numpy(weight).to(like), None if bias is None else torch.from_numpy(bias).to(like))
