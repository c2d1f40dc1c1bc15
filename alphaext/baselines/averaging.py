"""A weighted sum of linear layers, which is a linear layer; its weights and constants are the likeliest on validation samples.

Accuracy moves in steps, and of hundreds of weights and constants some fit a few hundred samples by chance. The likelihood of
their labels is smooth and convex in all of these numbers, and has one best place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from ..classes import ClassSplit
from ..training.options import CHOOSING
from ..training.result import AlphaNetWarning
from ..training.selection import BaselineResult, Policy, Validation, unfit_to_choose
from ..utils.callers import warn_caller
from ..utils.linear import check_fits, linear_parameters, make_linear
from ..utils.tensors import LabelledFeatures, TensorLike, as_tensor

__all__ = ["average"]

_Layer: TypeAlias = tuple[Tensor, Tensor | None]

# What keeps weights bounded where all samples are recognised: a normal prior with this deviation, at scores of unit spread.
_PRIOR_DEVIATION = 10.0


def average(
    layers: Sequence[nn.Module],
    val_features: TensorLike | LabelledFeatures,
    val_labels: TensorLike | None,
    split: ClassSplit,
    *,
    original: nn.Module | None = None,
    class_counts: TensorLike | None = None,
    select: str | None = None,
    min_all: float | None = None,
) -> BaselineResult:
    """Average linear layers: ``sum_j w_j (W_j x + b_j)``, and a constant on all few scores.

    Weights (at least 0) and constant are those under which the validation labels are likeliest; so the scores come out
    calibrated. Where the average is not better than ``original`` by ``select``, that is kept as it is. It is also kept, with a
    warning, where validation samples show too little of few or of base classes to choose by.

    Args:
        layers: two or more, such as ``nn.Linear``, all ``[N, D]``.
        val_features: ``[m, D]``, floating point; a tensor, an array or a memory map.
        val_labels: ``[m]`` integers; None where ``val_features`` are :class:`alphaext.features.Features`.
        split: which classes are few, medium and many.
        original: the classifier to do better than; default the first of ``layers``. One whose constant was chosen by its
            accuracy on the same samples looks better on them than it is.
        class_counts: ``[N]`` integers, training samples of each class: fit a multiple of their log to all scores as well.
        select: ``"best_all"`` (default) or ``"best_few"``, as for :func:`alphaext.baselines.choose_tau`.
        min_all: for ``"best_few"``, a fraction of 1; None takes the original's own accuracy over all.

    Returns:
        A :class:`alphaext.baselines.BaselineResult`, ``chosen`` ``{"candidate": "average"}`` or ``"original"``. Its
        ``settings`` have the average's ``weights``, of the layers as they are, its ``few_bias``, and ``count_slope``.

    Raises:
        TypeError, ValueError: fewer than two layers, layers of several shapes, samples that do not fit or are not finite.

    Example:
        >>> labels = torch.arange(4).repeat(50)
        >>> features = torch.nn.functional.one_hot(labels, 4) + 0.5 * torch.randn(200, 4)
        >>> layers = [nn.Linear(4, 4), discriminant(features, labels).linear]
        >>> average(layers, features, labels, ClassSplit(few=[3], medium=[0, 1, 2], many=[])).chosen
        {'candidate': 'average'}
    """
    started = time.monotonic()
    if len(layers) < 2:
        raise ValueError(f"layers must be at least two, got {len(layers)}")
    weight, _ = linear_parameters(layers[0])
    parameters = [_like(weight, layer) for layer in layers]
    kept = parameters[0] if original is None else _like(weight, original)
    validation = Validation(val_features, val_labels, split, weight)
    split = validation.split
    before = validation.of_layer(*kept)
    policy = Policy.of(select, min_all, validation.samples.labels, split.few, CHOOSING).bounded(before)
    candidates = [make_linear(*kept)]
    table: list[dict[str, Any]] = [{"candidate": "original", **before}]
    settings: dict[str, Any] = {}
    doubt = unfit_to_choose(validation.samples.labels, split)
    if doubt:
        warn_caller(f"no weights are chosen, and the original classifier is kept: {doubt}", AlphaNetWarning)
    else:
        directions = _directions(split, class_counts)
        stacked = torch.stack(list(directions.values()))
        weights, constants = _likeliest(parameters, stacked, validation)
        settings = {"weights": weights.tolist(), **dict(zip(directions, constants.tolist(), strict=True))}
        averaged = _summed(parameters, weights, constants @ stacked)
        candidates.append(averaged)
        table.append({"candidate": "average", **validation.of_layer(*linear_parameters(averaged))})
    chosen = policy.choose(table, list(range(len(table))))
    return BaselineResult(
        name="average",
        linear=candidates[chosen],
        chosen={"candidate": table[chosen]["candidate"]},
        table=table,
        policy=str(policy),
        settings=settings,
        seconds=time.monotonic() - started,
        original=before,
    )


def averaged(
    layers: Sequence[nn.Module], settings: Mapping[str, Any], split: ClassSplit, class_counts: TensorLike | None = None
) -> nn.Linear:
    """The average that the ``settings`` of :func:`average` describe."""
    weight, _ = linear_parameters(layers[0])
    directions = _directions(split, class_counts)
    shift = sum(settings[name] * direction for name, direction in directions.items())
    return _summed([_like(weight, layer) for layer in layers], torch.tensor(settings["weights"]), torch.as_tensor(shift))


def _directions(split: ClassSplit, class_counts: TensorLike | None) -> dict[str, Tensor]:
    """What constants multiply, each float64 ``[N]``."""
    directions = {"few_bias": torch.zeros(split.num_classes, dtype=torch.float64, device="cpu")}
    directions["few_bias"][split.few] = 1.0
    if class_counts is not None:
        directions["count_slope"] = as_tensor(class_counts, "class_counts").cpu().double().clamp(min=1).log()
    return directions


def _like(weight: Tensor, layer: nn.Module) -> _Layer:
    """The parameters of a layer that is to have the shape of ``weight``, in its dtype and on its device."""
    own, bias = linear_parameters(layer)
    check_fits(own.to(weight), "the weight of each layer", weight, tuple(weight.shape))
    return own.to(weight), None if bias is None else bias.to(weight)


def _summed(parameters: Sequence[_Layer], weights: Tensor, shift: Tensor) -> nn.Linear:
    """The weighted sum of layers ``[J]``, and ``shift`` ``[N]`` added to its bias."""
    first, _ = parameters[0]
    weight = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    bias = shift.to(first.device)
    for factor, (own_weight, own_bias) in zip(weights.tolist(), parameters, strict=True):
        weight += factor * own_weight.double()
        if own_bias is not None:
            bias = bias + factor * own_bias.double()
    return make_linear(weight.to(first), bias.to(first))


def _likeliest(parameters: Sequence[_Layer], directions: Tensor, validation: Validation) -> tuple[Tensor, Tensor]:
    """The weights ``[J]`` of the layers, and how much of each direction ``[A, N]`` is added, most likely on validation."""
    count, classes = len(parameters), directions.shape[1]
    # The layers' scores side by side; they are kept while they fit, else computed at each evaluation.
    stacked = torch.cat([weight for weight, _ in parameters])
    validation.keep(stacked)
    biases = torch.zeros(count, classes, dtype=torch.float64, device="cpu")
    for own, (_, bias) in zip(biases, parameters, strict=True):
        if bias is not None:
            own.copy_(bias)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for products, labels in validation.products(stacked):
            scores = products.cpu().double().view(-1, count, classes) + biases
            # What all classes share has no part in a likelihood, and none in the spread.
            yield scores - scores.mean(dim=2, keepdim=True), labels.cpu()

    samples = len(validation.samples.labels)
    squares = torch.zeros(count, dtype=torch.float64, device="cpu")
    for scores, _ in blocks():
        squares += scores.square().sum(dim=(0, 2))
    spread = (squares / (samples * classes)).sqrt().clamp(min=torch.finfo(torch.float64).tiny)

    def loss(numbers: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        """The mean loss and its gradient by the weights, at scores of unit spread, and the constants."""
        own = torch.from_numpy(numbers)
        weights, shift = own[:count] / spread, own[count:] @ directions
        prior = own / (_PRIOR_DEVIATION**2)
        value, gradient = float(prior @ own) / 2, prior.clone()
        for scores, labels in blocks():
            log_probabilities = torch.log_softmax((weights[:, None] * scores).sum(dim=1) + shift, dim=1)
            place = torch.arange(len(labels), device="cpu")
            value -= float(log_probabilities[place, labels].sum())
            residual = log_probabilities.exp()
            residual[place, labels] -= 1
            gradient[:count] += (residual[:, None] * scores).sum(dim=(0, 2)) / spread
            gradient[count:] += directions @ residual.sum(dim=0)
        return value / samples, (gradient / samples).numpy()

    bounds = [(0.0, None)] * count + [(None, None)] * len(directions)
    start = np.r_[np.ones(count), np.zeros(len(directions))]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    numbers = torch.from_numpy(found)
    return numbers[:count] / spread, numbers[count:]
