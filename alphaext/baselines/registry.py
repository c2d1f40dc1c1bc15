"""The paper's baselines and the cheap rivals, on cached features, by name: each makes a plain linear layer.

Nearest class mean, tau-normalisation, cRT and LWS are those of Kang et al. (ICLR 2020), logit adjustment is that of Menon et
al. (ICLR 2021); a constant on all few logits is the cheapest trade of one accuracy for another. What a baseline leaves open is
chosen on validation features; no function here takes test features.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..classes import ClassSplit, split_classes
from ..classes import class_counts as count_classes
from ..training.few_bias import choose_few_bias, few_bias
from ..training.selection import BaselineResult, Validation
from ..utils.checks import check_choice
from ..utils.linear import linear_parameters
from ..utils.tensors import LabelledFeatures, TensorLike, features_and_labels, optional_features_and_labels
from .averaging import average
from .choices import BASELINE_OPTIONS, BASELINES
from .linear_discriminant import discriminant, make_discriminant
from .nearest_mean import ncm
from .post_hoc import choose_logit_adjustment, choose_tau, logit_adjusted, tau_normalized
from .retraining import crt, lws

__all__ = ["run_baseline"]


def run_baseline(
    name: str,
    features: TensorLike | LabelledFeatures | None = None,
    labels: TensorLike | None = None,
    *,
    linear: nn.Module | None = None,
    val_features: TensorLike | LabelledFeatures | None = None,
    val_labels: TensorLike | None = None,
    class_counts: TensorLike | None = None,
    split: ClassSplit | None = None,
    few_below: int = 20,
    many_above: int = 100,
    select: str | None = None,
    min_all: float | None = None,
    **options: Any,
) -> BaselineResult:
    """Make the classifier of one of :data:`BASELINES`, with what it leaves open chosen on validation features.

    Args:
        name: a key of :data:`BASELINES`.
        features: ``[n, D]``, the training features; ncm, crt, lws and discriminant need them. These and ``val_features`` may be
            :class:`alphaext.features.Features`, which have their labels.
        labels: ``[n]`` integers, the training labels; with ``features``, or alone to count classes.
        linear: the trained classifier; all but ncm, crt and discriminant need it.
        val_features: ``[m, D]``, validation features; needed wherever something is chosen.
        val_labels: ``[m]`` integers.
        class_counts: ``[N]`` integers, training samples of each class; default those of ``labels``.
        split: which classes are few, medium and many; default by ``class_counts`` and the two thresholds.
        few_below: a class with fewer training samples is few; 20 in the paper.
        many_above: a class with more training samples is many; 100 in the paper.
        select: the policy, as for :func:`choose_tau` and :func:`crt`; of no interest where nothing is left to choose.
        min_all: for ``"best_few"``, a fraction of 1; None takes the accuracy of ``linear`` over all.
        options: the baseline's own. ncm: ``metric``, ``center``, ``normalize``. tau: ``tau`` (then nothing is chosen) or
            ``taus``, ``keep_bias``. logit-adjustment: ``tau`` or ``taus``. few-bias: ``offset`` or ``offsets``. crt and lws:
            ``epochs``, ``batch_size``, ``lr``, ``momentum``, ``weight_decay``, ``images_per_class``, ``seed``, ``device``,
            ``checkpoint``, ``progress``; crt also ``bias``. discriminant: ``tau``, ``top_k``, ``compose``, ``shrinkage``.
            average: ``other``, a layer, the discriminant of the features if not given. One that is None counts as not given.

    Returns:
        A :class:`alphaext.baselines.BaselineResult`.

    Raises:
        TypeError: an option that the baseline does not have, and whatever the baseline itself refuses.
        ValueError: an unknown name, something missing that the baseline needs (the message names it), and whatever the baseline
            itself refuses.

    Example:
        >>> labels = torch.arange(3).repeat_interleave(torch.tensor([120, 50, 5]))
        >>> features, linear = torch.randn(175, 4), nn.Linear(4, 3)
        >>> run_baseline("logit-adjustment", labels=labels, linear=linear, tau=1.0).chosen
        {'tau': 1.0}
        >>> result = run_baseline("ncm", features, labels, val_features=features, val_labels=labels)
        >>> sorted(result.accuracy)
        ['all', 'few', 'many', 'medium']
    """
    started = time.monotonic()
    check_choice(name, "name", tuple(BASELINES))
    own = {key: value for key, value in options.items() if value is not None}
    unknown = sorted(set(own) - set(BASELINE_OPTIONS[name]))
    if unknown:
        raise TypeError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(BASELINE_OPTIONS[name])}")
    if hasattr(features, "labels"):
        features, labels = features_and_labels(features, labels)
    val_features, val_labels = optional_features_and_labels(val_features, val_labels, "val_features", "val_labels")
    if class_counts is None and labels is not None:
        class_counts = count_classes(labels, None if linear is None else len(linear_parameters(linear)[0]))
    if split is None and class_counts is not None and (val_features is not None or name in ("few-bias", "discriminant")):
        split = split_classes(class_counts, few_below=few_below, many_above=many_above)
    given = {"features": features, "labels": labels, "linear": linear, "class_counts": class_counts, "split": split}
    given |= {"val_features": val_features}
    measured = val_features is not None and name not in _TRAINED
    for what in (*_NEEDS[name], *(["split"] if measured else [])):
        if given[what] is None:
            raise ValueError(f"{what}{_COUNTED.get(what, '')} must be given for {name}")
    value = _CHOSEN.get(name)
    choosing = value is not None and value not in own
    if choosing and val_features is None:
        raise ValueError(f"val_features and val_labels must be given for {name} to choose {value} by; or give {value} itself")
    call = SimpleNamespace(**given)
    if choosing or name in _CHOOSES:
        data = {"val_features": val_features, "val_labels": val_labels, "split": split, "select": select, "min_all": min_all}
        return _CHOOSE[name](call, data | own)
    made, settings = _MAKE[name](call, own)
    chosen = {} if value is None else {value: float(own[value])}
    table: list[dict[str, Any]] = []
    original = None
    if val_features is not None and val_labels is not None and split is not None:
        validation = Validation(val_features, val_labels, split, made.weight)
        table = [{**chosen, **validation.of_layer(*linear_parameters(made))}]
        original = None if linear is None else validation.of_layer(*linear_parameters(linear))
    return BaselineResult(name, made, chosen, table, "fixed", settings, time.monotonic() - started, original)


def _average(call: Any, options: dict[str, Any]) -> BaselineResult:
    other = options.pop("other", None)
    if other is None:
        if call.features is None or call.labels is None:
            raise ValueError("features and labels, or other, must be given for average")
        other = discriminant(call.features, call.labels, len(call.class_counts), split=call.split).linear
    return average([call.linear, other], **options)


_NEEDS = {
    "ncm": ("features", "labels"),
    "tau": ("linear",),
    "crt": ("features", "labels"),
    "lws": ("linear", "features", "labels"),
    "logit-adjustment": ("linear", "class_counts"),
    "few-bias": ("linear", "split"),
    "discriminant": ("features", "labels"),
    "average": ("linear", "val_features", "split"),
}
_COUNTED = {"class_counts": " (or labels, to count)", "split": " (or class_counts or labels, to count)"}

_TRAINED = ("crt", "lws")
_CHOOSES = (*_TRAINED, "average")

_CHOSEN = {"tau": "tau", "logit-adjustment": "tau", "few-bias": "offset"}

_CHOOSE: dict[str, Callable[[Any, dict[str, Any]], BaselineResult]] = {
    "tau": lambda call, options: choose_tau(call.linear, **options),
    "crt": lambda call, options: crt(call.features, call.labels, len(call.class_counts), linear=call.linear, **options),
    "lws": lambda call, options: lws(call.linear, call.features, call.labels, **options),
    "logit-adjustment": lambda call, options: choose_logit_adjustment(call.linear, call.class_counts, **options),
    "few-bias": lambda call, options: choose_few_bias(call.linear, **options),
    "average": _average,
}

_MAKE: dict[str, Callable[[Any, dict[str, Any]], tuple[nn.Linear, dict[str, Any]]]] = {
    "ncm": lambda call, options: (
        ncm(call.features, call.labels, len(call.class_counts), **options),
        {"metric": "cosine", "center": False, "normalize": False} | options,
    ),
    "tau": lambda call, options: (
        tau_normalized(call.linear, options["tau"], keep_bias=options.get("keep_bias", False)),
        {"keep_bias": bool(options.get("keep_bias", False))},
    ),
    "logit-adjustment": lambda call, options: (logit_adjusted(call.linear, call.class_counts, options["tau"]), {}),
    "few-bias": lambda call, options: (few_bias(call.linear, call.split.few, options["offset"]), {}),
    "discriminant": make_discriminant,
}
