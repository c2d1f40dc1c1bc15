"""The whole repair in one call."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import nn

from ..classes import ClassSplit, class_counts
from ..metrics.accuracy import SplitMetrics
from ..training.builder import Builder
from ..training.engine import hits_of
from ..training.presets import PRESETS_AND_ALL
from ..training.result import FitResult
from ..utils.checks import check_choice
from ..utils.linear import make_linear
from ..utils.tensors import LabelledFeatures, TensorLike
from .preset import Repair, repair_by_preset
from .recommend import compare_methods

__all__ = ["repair"]

# What method="auto" takes besides the policy.
_OF_AUTO = ("min_all", "max_base_drop", "seed")


def repair(
    linear: nn.Module,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    *,
    val_features: TensorLike | LabelledFeatures | None = None,
    val_labels: TensorLike | None = None,
    preset: str = "few",
    method: str | None = None,
    policy: str | None = None,
    few_below: int = 20,
    many_above: int = 100,
    split: ClassSplit | None = None,
    few_classes: TensorLike | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Repair:
    """Rebuild the few rows of a trained classifier, by cached features.

    Args:
        linear: the trained classifier, such as ``nn.Linear``, in float32 or float64; it is not changed.
        features: ``[n, D]``, the training features.
        labels: ``[n]`` integers, where ``features`` is no :class:`alphaext.features.Features`, which has its labels.
        val_features: ``[m, D]`` with ``val_labels``, or features likewise: what the epoch and the constant on the few scores
            are chosen by. Without, the last epoch is taken, and no constant.
        val_labels: ``[m]`` integers.
        preset: ``"few"`` or ``"paper"`` (:data:`alphaext.training.PRESETS`), which change few rows alone; or ``"all"``:
            preset few averaged with the discriminant and with balanced re-training. That may change every row, and needs
            validation samples.
        method: ``"auto"``: what :func:`alphaext.recommend` recommends, its presets with their own options; without validation
            samples by cross-validation. None (default) for ``preset``.
        policy: with ``method="auto"``, ``"best_all"`` (default) or ``"best_few"``; it, ``min_all`` and ``max_base_drop`` are as
            for :func:`alphaext.recommend`.
        few_below: a class with fewer training samples is few; 20 in the paper.
        many_above: a class with more is many; 100 in the paper.
        split: which classes are few, medium and many, instead of these two.
        few_classes: ids of the classes to repair, however many samples they have, instead of ``few_below``; or
            names, where ``features`` have such.
        progress: show a progress bar; None shows it where standard error is a terminal.
        options: any of a configuration of :func:`alphaext.fit_many`, in place of the preset's.

    Returns:
        A :class:`Repair`.

    Raises:
        TypeError, ValueError: as :func:`alphaext.fit_many`.
        FloatingPointError: the training diverged.

    Example:
        >>> features, labels = torch.randn(95, 8), torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
        >>> original = nn.Linear(8, 4)
        >>> made = repair(original, features, labels, epochs=2)
        >>> torch.equal(made.linear.weight[:3], original.weight[:3]), made.head.coefficients
        (True, 'direct')
    """
    check_choice(preset, "preset", PRESETS_AND_ALL)
    check_choice(method or "auto", "method", ("auto",))
    bounds = {name: options.pop(name) for name in _OF_AUTO if name in options} if method == "auto" else {}
    refused = (
        {"preset": preset != "few", **dict.fromkeys(options, True)} if method == "auto" else {"policy": policy is not None}
    )
    for name in (name for name, given in refused.items() if given):
        raise ValueError(f"{name} does not go with method={method!r}")
    builder = Builder(
        linear,
        features,
        labels,
        val_features=val_features,
        val_labels=val_labels,
        few_below=few_below,
        many_above=many_above,
        split=split,
        few_classes=few_classes,
    )
    if method == "auto":
        return _recommended(linear, builder, policy or "best_all", bounds)
    return repair_by_preset(linear, builder, preset, options, progress)


def _recommended(linear: nn.Module, builder: Builder, policy: str, bounds: dict[str, Any]) -> Repair:
    """What a comparison of all methods takes."""
    started, validation = time.monotonic(), builder.validation
    comparison = compare_methods(linear, builder, policy=policy, **bounds)
    found = comparison.recommendation
    if comparison.repair is not None:
        return replace(comparison.repair, recommendation=found)
    before = after = None
    if validation is not None:
        metrics = SplitMetrics(builder.split, class_counts(validation.labels, len(builder.weight)))
        layers = (make_linear(builder.weight, builder.bias), found.linear)
        before, after = (metrics.of(hits_of(layer, validation)) for layer in layers)
    result = FitResult(
        history=[],
        selected_epoch=0,
        selection=policy,
        metrics_before=before,
        metrics_after=after,
        clamped=0,
        engine="",
        engine_reason="",
        seconds=time.monotonic() - started,
        kept_original=found.method == "original",
        verified=validation is not None,
        notes=[found.advice],
    )
    return Repair(found.linear, None, result, builder.split, recommendation=found)
