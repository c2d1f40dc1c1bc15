"""The paper's baselines and the cheap rivals, on cached features, by name: each makes a plain linear layer.

Nearest class mean, tau-normalisation, cRT and LWS are those of Kang et al. (ICLR 2020), logit adjustment is that of Menon et
al. (ICLR 2021); a constant on all few logits is the cheapest trade of one accuracy for another. What a baseline leaves open is
chosen on validation features; no function here takes test features.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..classes import ClassSplit, split_classes
from ..classes import class_counts as count_classes
from ..training.few_bias import choose_few_bias, few_bias
from ..training.selection import BaselineResult, Rescaling, Validation
from ..utils.checks import check_choice
from ..utils.linear import linear_parameters, wide
from ..utils.tensors import TensorLike
from .choices import BASELINE_OPTIONS, BASELINES
from .nearest_mean import ncm
from .post_hoc import choose_logit_adjustment, choose_tau, logit_adjusted, tau_normalized
from .retraining import crt, lws

__all__ = ["run_baseline"]


def run_baseline(
    name: str,
    features: TensorLike | None = None,
    labels: TensorLike | None = None,
    *,
    linear: nn.Module | None = None,
    val_features: TensorLike | None = None,
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
        name: ``"ncm"``, ``"tau"``, ``"crt"``, ``"lws"``, ``"logit-adjustment"`` or ``"few-bias"``.
        features: ``[n, D]``, the training features; ncm, crt and lws need them.
        labels: ``[n]`` integers, the training labels; with ``features``, or alone to count classes.
        linear: the trained classifier; all but ncm and crt need it.
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
            ``checkpoint``, ``progress``; crt also ``bias``. One that is None counts as not given.

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
    if (val_features is None) != (val_labels is None):
        raise ValueError("val_features and val_labels must be given together")
    given = {"features": features, "labels": labels, "linear": linear}
    for what in _NEEDS[name]:
        if given[what] is None:
            raise ValueError(f"{what} must be given for {name}")
    if class_counts is None and labels is not None:
        class_counts = count_classes(labels, None if linear is None else len(linear_parameters(linear)[0]))
    if split is None and class_counts is not None and (val_features is not None or name == "few-bias"):
        split = split_classes(class_counts, few_below=few_below, many_above=many_above)
    call = _Call(name, features, labels, linear, val_features, val_labels, class_counts, split, select, min_all, own, started)
    return _RUN[name](call)


_NEEDS = {
    "ncm": ("features", "labels"),
    "tau": ("linear",),
    "crt": ("features", "labels"),
    "lws": ("linear", "features", "labels"),
    "logit-adjustment": ("linear",),
    "few-bias": ("linear",),
}


@dataclass(frozen=True)
class _Call:
    """What :func:`run_baseline` was given; ``Any`` where :data:`_NEEDS` or :meth:`need` has seen to it."""

    name: str
    features: Any
    labels: Any
    linear: Any
    val_features: TensorLike | None
    val_labels: TensorLike | None
    class_counts: Any
    split: Any
    select: str | None
    min_all: float | None
    options: dict[str, Any]
    started: float

    def need(self, *names: str) -> None:
        """Check that what can be counted was given or counted."""
        for name in names:
            if getattr(self, name) is None:
                other = "class_counts or labels, to count" if name == "split" else "labels, to count"
                raise ValueError(f"{name} (or {other}) must be given for {self.name}")

    def validation(self) -> dict[str, Any]:
        """What the functions that choose take."""
        names = ("val_features", "val_labels", "split", "select", "min_all")
        return {name: getattr(self, name) for name in names}

    def choice(self, value: str) -> dict[str, Any]:
        """The same where ``value`` must be chosen."""
        if self.val_features is None:
            raise ValueError(
                f"val_features and val_labels must be given for {self.name} to choose {value} by; or give {value} itself"
            )
        self.need("split")
        return self.validation()

    def fixed(self, linear: nn.Linear, chosen: dict[str, Any], settings: dict[str, Any]) -> BaselineResult:
        """The result where nothing was left to choose, measured on validation data if there are some."""
        table: list[dict[str, Any]] = []
        original = None
        if self.val_features is not None and self.val_labels is not None:
            self.need("split")
            validation = Validation(self.val_features, self.val_labels, self.split, linear.weight)
            table = [{**chosen, **_accuracy(linear, validation)}]
            original = None if self.linear is None else _accuracy(self.linear, validation)
        seconds = time.monotonic() - self.started
        return BaselineResult(self.name, linear, chosen, table, "fixed", settings, seconds, original)


def _accuracy(linear: nn.Module, validation: Validation) -> dict[str, float]:
    weight, bias = linear_parameters(linear)
    return validation.accuracies(wide(weight), [Rescaling(None, None if bias is None else wide(bias))])[0]


def _run_ncm(call: _Call) -> BaselineResult:
    made = ncm(call.features, call.labels, len(call.class_counts), **call.options)
    return call.fixed(made, {}, {"metric": "cosine", "center": False, "normalize": False} | call.options)


def _run_tau(call: _Call) -> BaselineResult:
    options = dict(call.options)
    if "tau" not in options:
        return choose_tau(call.linear, **call.choice("tau"), **options)
    tau, keep_bias = options["tau"], options.get("keep_bias", False)
    made = tau_normalized(call.linear, tau, keep_bias=keep_bias)
    return call.fixed(made, {"tau": float(tau)}, {"keep_bias": bool(keep_bias)})


def _run_logit_adjustment(call: _Call) -> BaselineResult:
    call.need("class_counts")
    if "tau" not in call.options:
        return choose_logit_adjustment(call.linear, call.class_counts, **call.choice("tau"), **call.options)
    made = logit_adjusted(call.linear, call.class_counts, call.options["tau"])
    return call.fixed(made, {"tau": float(call.options["tau"])}, {})


def _run_few_bias(call: _Call) -> BaselineResult:
    call.need("split")
    if "offset" not in call.options:
        return choose_few_bias(call.linear, **call.choice("offset"), **call.options)
    made = few_bias(call.linear, call.split.few, call.options["offset"])
    return call.fixed(made, {"offset": float(call.options["offset"])}, {})


def _run_crt(call: _Call) -> BaselineResult:
    classes = len(call.class_counts)
    return crt(call.features, call.labels, classes, linear=call.linear, **call.validation(), **call.options)


def _run_lws(call: _Call) -> BaselineResult:
    return lws(call.linear, call.features, call.labels, **call.validation(), **call.options)


_RUN: dict[str, Callable[[_Call], BaselineResult]] = {
    "ncm": _run_ncm,
    "tau": _run_tau,
    "crt": _run_crt,
    "lws": _run_lws,
    "logit-adjustment": _run_logit_adjustment,
    "few-bias": _run_few_bias,
}
