"""Changes of a trained classifier that need no training: tau-normalisation, logit adjustment, a constant on all few logits.

Each has one number, which a ``choose_...`` function finds on validation features. No function here takes test features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..classes import ClassSplit, split_classes
from ..training.options import CHOOSING
from ..training.selection import BaselineResult, Policy, Rescaling, Validation
from ..utils.checks import check_number, format_ids
from ..utils.linear import linear_parameters, make_linear, wide
from ..utils.tensors import LabelledFeatures, TensorLike, as_tensor, check_integral, check_list, check_shape

__all__ = [
    "TAUS",
    "choose_logit_adjustment",
    "choose_tau",
    "logit_adjusted",
    "tau_normalized",
]

TAUS = tuple(round(0.1 * step, 1) for step in range(21))
"""The taus that are tried: 0 to 2 in steps of 0.1, as Kang et al.'s code prints them."""


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


def choose_tau(
    linear: nn.Module,
    val_features: TensorLike | LabelledFeatures,
    val_labels: TensorLike | None,
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
        val_features: ``[m, D]``, floating point; a tensor, an array or a memory map. Or :class:`alphaext.features.Features`.
        val_labels: ``[m]`` integers; None where the features know them.
        split: which classes are few, medium and many.
        taus: the candidates; default 0 to 2 in steps of 0.1, as Kang et al.'s code prints them (without choosing).
        keep_bias: as for :func:`tau_normalized`.
        select: ``"best_all"``, the best accuracy over all validation samples (default); ``"best_few"``, the best few accuracy
            among those whose accuracy over all is not below ``min_all`` (if none is, the best accuracy over all). Of equal
            ones, the smallest tau.
        min_all: for ``"best_few"``, a fraction of 1; None takes the classifier's own accuracy over all.

    Returns:
        A :class:`alphaext.baselines.BaselineResult`. Its accuracies are those of the layer to the rounding of its scores.

    Raises:
        TypeError, ValueError: as :func:`tau_normalized`; no candidates; features and labels that do not fit or are not finite;
            less than ten samples of few or of base classes, or of less than half of them.

    Example:
        >>> split = ClassSplit(few=[1], medium=[], many=[0])
        >>> choose_tau(nn.Linear(4, 2), torch.randn(20, 4), [0, 1] * 10, split, taus=[0.5]).chosen
        {'tau': 0.5}
    """
    weight, bias = linear_parameters(linear)
    shift = None if bias is None or not keep_bias else wide(bias)
    return _chosen_tau(
        "tau",
        linear,
        Validation(val_features, val_labels, split, weight),
        taus,
        lambda tau: Rescaling(_tau_factors(weight, tau).to(wide(weight[:0]).dtype), shift),
        lambda tau: tau_normalized(linear, tau, keep_bias=keep_bias),
        {"keep_bias": bool(keep_bias)},
        select,
        min_all,
    )


def choose_logit_adjustment(
    linear: nn.Module,
    class_counts: TensorLike,
    val_features: TensorLike | LabelledFeatures,
    val_labels: TensorLike | None = None,
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
        A :class:`alphaext.baselines.BaselineResult`.

    Raises:
        TypeError, ValueError: as :func:`logit_adjusted` and :func:`choose_tau`.

    Example:
        >>> choose_logit_adjustment(nn.Linear(4, 2), [150, 5], torch.randn(20, 4), [0, 1] * 10, taus=[1]).chosen
        {'tau': 1.0}
    """
    weight, bias = linear_parameters(linear)
    shares = _log_shares(class_counts, len(weight))
    if split is None:
        split = split_classes(as_tensor(class_counts, "class_counts"))
    return _chosen_tau(
        "logit-adjustment",
        linear,
        Validation(val_features, val_labels, split, weight),
        taus,
        lambda tau: Rescaling(None, _adjusted_bias(weight, bias, shares, tau).to(wide(weight[:0]).dtype)),
        lambda tau: logit_adjusted(linear, class_counts, tau),
        {},
        select,
        min_all,
    )


def _chosen_tau(
    name: str,
    linear: nn.Module,
    validation: Validation,
    taus: Sequence[float],
    change: Callable[[float], Rescaling],
    made: Callable[[float], nn.Linear],
    settings: dict[str, Any],
    select: str | None,
    min_all: float | None,
) -> BaselineResult:
    """The result of a choice among taus: ``change`` is what each makes of products, ``made`` the layer that does so."""
    started = time.monotonic()
    weight, bias = linear_parameters(linear)
    candidates = sorted({check_number(tau, "taus", minimum=0) for tau in check_list(taus, "taus")})
    own = Rescaling(None, None if bias is None else wide(bias))
    original, *accuracies = validation.accuracies(wide(weight), [own, *map(change, candidates)])
    policy = Policy.of(select, min_all, validation.samples.labels, validation.split.few, CHOOSING).bounded(original)
    validation.check_fit_to_choose("tau")
    tau = candidates[policy.choose(accuracies, candidates)]
    table = [{"tau": each, **accuracy} for each, accuracy in zip(candidates, accuracies, strict=True)]
    layer, seconds = made(tau), time.monotonic() - started
    return BaselineResult(name, layer, {"tau": tau}, table, str(policy), settings, seconds, original)


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
