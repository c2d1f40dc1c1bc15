"""The shrunk linear discriminant: class means and one covariance, no training; means of few samples composed with near ones.

With ``P`` the inverse of the covariance, class ``c`` has the row ``P m_c`` and the bias ``-m_c' P m_c / 2``. Rows are linear in
means, so to pull a mean toward its neighbours' is to compose its row as an Alpha Net does (docs/reference/discriminant.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..classes import ClassSplit, class_sums, split_classes
from ..head.composition import closed_form_alphas
from ..head.neighbors import nearest_classes
from ..utils.checks import check_choice, check_integer, check_number, if_given
from ..utils.linear import make_linear
from ..utils.tensors import LabelledFeatures, TensorLike, as_tensor, check_finite, check_whole, features_and_labels

__all__ = ["COMPOSED", "Discriminant", "discriminant"]

COMPOSED = ("few", "all")
"""Which classes' means are composed with their neighbours'."""

# Elements of one block of features: enough for a fast product, few enough for memory.
_BLOCK_ELEMENTS = 1 << 20
# Where base means lie no farther from their neighbours than noise would move them, tau has no bound of its own.
_LARGEST_TAU = 100.0


@dataclass(frozen=True)
class Discriminant:
    """What :func:`discriminant` made.

    Attributes:
        linear: the classifier.
        tau: so many samples weigh as much as the neighbours' mean; given, or estimated.
        shrinkage: share of the multiple of the identity in the covariance; given, or by Ledoit and Wolf's rule.
        members: ``[C, K+1]`` int64, the classes whose means were composed, each before its neighbours, nearest first.
        alphas: ``[C, K+1]`` float64, what each of them counts.
    """

    linear: nn.Linear
    tau: float
    shrinkage: float
    members: Tensor
    alphas: Tensor


def discriminant(
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    num_classes: int | None = None,
    *,
    split: ClassSplit | None = None,
    tau: float | None = None,
    top_k: int = 5,
    compose: str = "few",
    shrinkage: float | None = None,
    normalize: bool = False,
) -> Discriminant:
    """Make the linear discriminant of the training features, its few means composed with those of near base classes.

    The mean of ``n`` samples counts ``n / (n + tau)``, that of its neighbours' means the rest; biases are computed from the
    composed means. Without ``tau`` it is estimated on base classes, as how far a mean lies from its neighbours' mean, noise
    subtracted, against how far samples scatter, both measured by the covariance. So much a mean is worth to begin with.

    Args:
        features: ``[n, D]``, floating point, the training features; read block by block, twice, so a memory map will do. Three
            matrices ``[D, D]`` of float64 are held. Or :class:`alphaext.features.Features`, which have their labels.
        labels: ``[n]`` integers; every class must have a sample.
        num_classes: N. Default: the largest label plus one.
        split: which classes are few and base. Default: by the labels, with the paper's thresholds.
        tau: at least 0, 0 for the plain discriminant. Default: estimated, at most 100.
        top_k: nearest base classes whose means are taken, 5 (where there are fewer, all).
        compose: the classes whose means are composed: ``"few"`` (default), or ``"all"``, base classes too.
        shrinkage: 0 to 1, the share of the multiple of the identity in the covariance. Default: by the rule of Ledoit and Wolf
            (Journal of Multivariate Analysis 88, 2004), as in scikit-learn.
        normalize: make each sample's features equally long first. The result is then for such features,
            ``linear(torch.nn.functional.normalize(x))``, and no plain layer of ``x``: its bias would need each sample's length.

    Returns:
        A :class:`Discriminant`, its layer on the device of ``features``, in their dtype but at least float32.

    Raises:
        TypeError: features that are not floating point, labels that are not integers.
        ValueError: a class without samples, or a number out of range; features that are not finite, do not scatter within
            classes, or have too singular a covariance for ``shrinkage``; a ``tau`` above 0 without base classes.

    Example:
        >>> labels = torch.tensor([0] * 30 + [1] * 30 + [2] * 4)
        >>> made = discriminant(torch.randn(64, 3) + labels[:, None], labels, tau=4.0)
        >>> made.members, made.alphas
        (tensor([[2, 1, 0]]), tensor([[0.5000, 0.2500, 0.2500]], dtype=torch.float64))
    """
    tau = if_given(check_number, tau, "tau", minimum=0)
    shrinkage = if_given(check_number, shrinkage, "shrinkage", minimum=0, maximum=1)
    top_k = check_integer(top_k, "top_k", minimum=1)
    check_choice(compose, "compose", COMPOSED)
    features, labels = features_and_labels(features, labels)
    check_whole(features)
    sums, counts, like = class_sums(features, labels, num_classes, _normalized if normalize else None)
    means = torch.from_numpy(sums) / counts[:, None]
    check_finite(means, "the sum over a class of features")
    if split is None:
        split = split_classes(counts)
    elif not isinstance(split, ClassSplit) or split.num_classes != len(counts):
        raise ValueError(f"split must be a ClassSplit of {len(counts)} classes, got {split!r}")
    split = split.cpu()
    covariance, rule = _covariance(features, labels, means, normalize)
    shrinkage = rule if shrinkage is None else shrinkage
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * covariance.trace() / len(covariance))
    factor, info = torch.linalg.cholesky_ex(shrunk)
    if int(info):
        raise ValueError(f"shrinkage={shrinkage:g} leaves a covariance of features that has no inverse; a larger one has")
    inverse = torch.cholesky_inverse(factor)

    targets = split.few if compose == "few" else torch.cat([split.few, split.base]).sort().values
    members = _members(means, targets, split.base, top_k)
    if members.shape[1] == 1 and tau:
        raise ValueError(f"tau={tau:g} composes means with those of base classes, and there is none; tau=0 leaves them alone")
    if tau is None:
        tau = _estimated_tau(means, counts, inverse, float((inverse * covariance).sum()), split.base, top_k)
    alphas = torch.ones(len(members), 1, dtype=torch.float64, device="cpu")
    if members.shape[1] > 1:
        alphas = closed_form_alphas(counts[members[:, 0]], members.shape[1] - 1, tau)
    composed = means.clone()
    composed[members[:, 0]] = (alphas[:, :, None] * means[members]).sum(dim=1)
    weight = composed @ inverse
    bias = -(weight * composed).sum(dim=1) / 2
    check_finite(bias, "the classifier of features")
    return Discriminant(make_linear(weight.to(like), bias.to(like)), tau, shrinkage, members, alphas)


def make_discriminant(call: Any, options: dict[str, Any]) -> tuple[nn.Linear, dict[str, Any]]:
    """The layer and the settings that :func:`alphaext.baselines.run_baseline` reports."""
    made = discriminant(call.features, call.labels, len(call.class_counts), split=call.split, **options)
    given = {"top_k": 5, "compose": "few"} | options
    return made.linear, given | {"tau": made.tau, "shrinkage": made.shrinkage}


def _normalized(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.nn.functional.normalize(torch.from_numpy(rows), dim=1).numpy()


def _blocks(features: TensorLike, normalize: bool) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows in float64 on the CPU, each with the place of its first row."""
    source = features if isinstance(features, (Tensor, np.ndarray)) else as_tensor(features, "features")
    rows = max(1, _BLOCK_ELEMENTS // max(1, int(source.shape[1])))
    for start in range(0, len(source), rows):
        block = as_tensor(source[start : start + rows], "features").detach().to("cpu", torch.float64)
        yield start, torch.nn.functional.normalize(block, dim=1) if normalize else block


def _covariance(features: TensorLike, labels: TensorLike, means: Tensor, normalize: bool) -> tuple[Tensor, float]:
    """The covariance of samples around their class means ``[D, D]``, and Ledoit and Wolf's shrinkage of it."""
    width = means.shape[1]
    products = torch.zeros(width, width, dtype=torch.float64, device="cpu")
    ids, fourth = as_tensor(labels, "labels").cpu().long(), 0.0
    for start, block in _blocks(features, normalize):
        centered = block - means[ids[start : start + len(block)]]
        products.addmm_(centered.t(), centered)
        fourth += float(centered.square().sum(dim=1).square().sum())
    if not math.isfinite(fourth) or float(products.trace()) == 0:
        raise ValueError("features must scatter within classes, by finite squares; theirs do not")
    samples = len(ids)
    mean_variance = float(products.trace()) / samples / width
    squares = float(products.square().sum()) / samples**2
    noise = (fourth / samples - squares) / samples
    spread = squares - width * mean_variance**2
    rule = min(noise, spread) / spread if spread > 0 else 0.0
    return products / max(samples - len(means), 1), min(max(rule, 0.0), 1.0)


def _members(means: Tensor, targets: Tensor, base: Tensor, top_k: int) -> Tensor:
    """Each target before its nearest base classes, ``[C, K+1]``; without neighbours where there are none for every target."""
    available = len(base) - int(torch.isin(targets, base).any())
    if available < 1 or not len(targets):
        return targets[:, None]
    return torch.cat([targets[:, None], nearest_classes(means, targets, base, min(top_k, available))], dim=1)


def _estimated_tau(means: Tensor, counts: Tensor, inverse: Tensor, scatter: float, base: Tensor, top_k: int) -> float:
    """How far samples scatter over how far base means lie from their neighbours' mean, both squared and by the covariance.

    A mean of ``n`` samples is off by ``scatter / n``, the neighbours' mean by that of each of theirs.
    """
    members = _members(means, base, base, top_k)
    neighbors = members[:, 1:]
    if not neighbors.shape[1]:
        return 0.0
    apart = means[base] - means[neighbors].mean(dim=1)
    noise = scatter * (1 / counts[base] + (1 / counts[neighbors]).sum(dim=1) / neighbors.shape[1] ** 2)
    between = float((((apart @ inverse) * apart).sum(dim=1) - noise).mean())
    return min(scatter / between, _LARGEST_TAU) if between > 0 else _LARGEST_TAU
